"""Other routers, each in an environment of its own: how to install and start them."""

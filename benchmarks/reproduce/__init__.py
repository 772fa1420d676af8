"""What papers published, in this simulator: a module per result, each with its losing cases."""

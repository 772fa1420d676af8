"""Four routers over one fleet of workers, and what goes wrong in it. All processes are real."""

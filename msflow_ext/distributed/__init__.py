"""Several processes that train together, and workers that do many tasks."""

"""Train in several processes, and run many tasks on workers."""

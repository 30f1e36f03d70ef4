"""Heat maps, charts, and HTML pages of single runs and of comparisons."""

"""Heat maps, charts, and the HTML pages of one run and of several."""

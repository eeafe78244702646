"""A URI in, an open file out: the SSRF guard, limits per host, robots.txt, object stores."""

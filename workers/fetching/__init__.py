"""From a URI to an open file: the SSRF guard, limits per host, robots.txt, object stores."""

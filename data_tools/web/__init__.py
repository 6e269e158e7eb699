"""The crawl: pictures fetched from the web, politely and safely."""

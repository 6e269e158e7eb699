"""After the crawl: sensitive pictures, near duplicates, and what must not be trained on."""

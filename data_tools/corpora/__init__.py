"""Importers: public data sets, from the files that their sites give, as rows of one form
(`registry.FORMATS`)."""

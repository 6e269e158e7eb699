"""Benchmarks made from a log (ICM, IQM, ICR, IQR), and the sheets on which people correct them."""

"""The click log: read, judged by one set of rules on DuckDB or Spark, and asked about."""

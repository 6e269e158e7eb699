"""Stages for the pipeline's tests: real ones, that take no time."""

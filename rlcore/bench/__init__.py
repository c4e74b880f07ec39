"""Benchmarks: one table of cases, contestants checked before they are timed, floors measured."""

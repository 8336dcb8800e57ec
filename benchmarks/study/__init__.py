"""The study behind `docs/results.md`: data, methods, fitting, measuring and the tables; run by `paper_table.py`."""

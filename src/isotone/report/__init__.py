"""The report of a run: a page, its figures and its tables, from records and results only."""

from isotone.report.page import write_report, write_tables
from isotone.report.texts import write_token_texts

__all__ = ["write_report", "write_tables", "write_token_texts"]

"""Rows -> records -> token ids: preference pairs read, checked, split, tokenised and cut to length."""

from polyref.data.records import parse_record, record_to_row, to_messages
from polyref.data.sources import load_packaged, load_preferences, split_by_prompt
from polyref.data.tokenize import tokenize_for_reference, tokenize_record, tokenize_records
from polyref.data.truncate import truncate_pair
from polyref.data.validate import validate_preferences
from polyref.data.validation_text import render_report

__all__ = [
    "load_packaged",
    "load_preferences",
    "parse_record",
    "record_to_row",
    "render_report",
    "split_by_prompt",
    "to_messages",
    "tokenize_for_reference",
    "tokenize_record",
    "tokenize_records",
    "truncate_pair",
    "validate_preferences",
]

"""Rows -> records -> token ids: reading, checking, splitting, tokenising and truncating preference pairs."""

from polyref.data.records import parse_record, record_to_row, to_messages
from polyref.data.sources import load_packaged, load_preferences, split_by_prompt
from polyref.data.tokenize import tokenize_for_reference, tokenize_record, tokenize_records
from polyref.data.truncate import truncate_pair

__all__ = [
    "load_packaged",
    "load_preferences",
    "parse_record",
    "record_to_row",
    "split_by_prompt",
    "to_messages",
    "tokenize_for_reference",
    "tokenize_record",
    "tokenize_records",
    "truncate_pair",
]

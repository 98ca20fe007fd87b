"""Rows -> records -> token ids: reading, checking, splitting, tokenising and truncating preference pairs."""

from polyref.data.records import parse_record, to_messages
from polyref.data.sources import load_packaged, load_preferences, split_by_prompt

__all__ = ["load_packaged", "load_preferences", "parse_record", "split_by_prompt", "to_messages"]

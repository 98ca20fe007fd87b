"""Labels from a person: pairs without labels -> a page or a file to vote in -> durable votes -> records with vote shares."""

from polyref.labelling.desk import Desk
from polyref.labelling.labels import label_records
from polyref.labelling.pairs import Pair, pairs_of
from polyref.labelling.server import served
from polyref.labelling.sheet import read_sheet, write_sheet
from polyref.labelling.votes import Vote, Votes

__all__ = ["Desk", "Pair", "Vote", "Votes", "label_records", "pairs_of", "read_sheet", "served", "write_sheet"]

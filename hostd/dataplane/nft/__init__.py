# Owns: the nf_tables door: see table.NftTable.
from __future__ import annotations

from .admission import Admission, Element, Granted, group
from .intervals import disjoint
from .reading import Actual
from .render import Content, render
from .rules import fingerprint
from .table import NftTable, supports_owner_persist
from .transaction import Transaction, TransactionRefused

__all__ = [
    "Actual",
    "Admission",
    "Content",
    "Element",
    "Granted",
    "NftTable",
    "Transaction",
    "TransactionRefused",
    "disjoint",
    "fingerprint",
    "group",
    "render",
    "supports_owner_persist",
]

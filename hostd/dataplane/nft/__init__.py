# Owns: the nf_tables door: see table.NftTable.
from __future__ import annotations

from hostd.dataplane.nft.admission import Admission, Element, Granted, group
from hostd.dataplane.nft.intervals import disjoint
from hostd.dataplane.nft.reading import Actual
from hostd.dataplane.nft.render import Content, render
from hostd.dataplane.nft.rules import fingerprint
from hostd.dataplane.nft.table import NftTable, supports_owner_persist
from hostd.dataplane.nft.transaction import Transaction, TransactionRefused

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

"""Message types of a client's turn in each phase."""

from fedp2eft.methods.fedl2p import PHASE as FEDL2P
from fedp2eft.runtime.phases import BASE, PSG_PHASE

TRAIN_BASE, TRAIN_PSG, TRAIN_FEDL2P = BASE.kind, PSG_PHASE.kind, FEDL2P.kind

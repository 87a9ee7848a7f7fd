"""How the federation trains the base model itself: one small file each, registered by one line."""

from __future__ import annotations

from fedp2eft.bases.base import BaseTraining, LocalWork, copy_parameters, rate
from fedp2eft.bases.dept_spec import DeptSpec
from fedp2eft.bases.feddpa_t import FedDPAT
from fedp2eft.bases.fedit import FedIT
from fedp2eft.bases.ffa_lora import FFALora
from fedp2eft.bases.standard_fl import StandardFL

BASES: dict[str, BaseTraining] = {
    "standard-fl": StandardFL(),
    "fedit": FedIT(),
    "ffa-lora": FFALora(),
    "feddpa-t": FedDPAT(),
    "dept-spec": DeptSpec(),
    "none": BaseTraining(),
}

__all__ = ["BASES", "BaseTraining", "LocalWork", "copy_parameters", "rate"]

"""The rules by the name that ``"optimizer": {"type": ...}`` gives them."""

from __future__ import annotations

from megalr.rules.adam_mini import AdamMini
from megalr.rules.adarankgrad import AdaRankGrad
from megalr.rules.apollo import Apollo, ApolloMini
from megalr.rules.badam import BAdam
from megalr.rules.base import Rule
from megalr.rules.came import CAME
from megalr.rules.fira import Fira
from megalr.rules.frugal import FRUGAL
from megalr.rules.galore import GaLore
from megalr.rules.golore import GoLore
from megalr.rules.ldadam import LDAdam
from megalr.rules.muon import Muon
from megalr.rules.online_subspace_descent import OnlineSubspaceDescent
from megalr.rules.q_galore import QGaLore
from megalr.rules.scale import SCALE
from megalr.rules.spam import SPAM
from megalr.rules.stable_spam import StableSPAM

# AdamW is element-wise: it needs no matrices, and is the optimizer's own.
RULES: dict[str, type[Rule] | None] = {
    "AdamW": None,
    "GaLoreAdamW": GaLore,
    "GoLoreAdamW": GoLore,
    "FiraAdamW": Fira,
    "APOLLO": Apollo,
    "APOLLOMini": ApolloMini,
    "LDAdamW": LDAdam,
    "OnlineSubspaceDescent": OnlineSubspaceDescent,
    "Muon": Muon,
    "StableSPAM": StableSPAM,
    "SPAM": SPAM,
    "SCALE": SCALE,
    "AdamMini": AdamMini,
    "CAME": CAME,
    "FRUGAL": FRUGAL,
    "BAdam": BAdam,
    "QGaLoreAdamW": QGaLore,
    "AdaRankGrad": AdaRankGrad,
}

"""Small language models: one whose matrices have every awkward shape, and one of numbered layers for factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

HIDDEN, VOCABULARY, EXPERTS = 20, 61, 3


class OddModel(nn.Module):
    """One row, below the rank, odd, stacked. Tokens in, next-token loss out; the trunk's names contain "mlp".

    Args:
        frozen: one of the trunk's matrices is not trained.
        unused: one of the trunk's matrices takes no part in the loss.
        tied: the head is the embedding.
    """

    def __init__(self, *, frozen: bool = False, unused: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.mlp_wide = nn.Linear(37, HIDDEN, bias=False)
        self.mlp_tall = nn.Linear(HIDDEN, 37)
        self.mlp_square = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.mlp_row = nn.Linear(HIDDEN, 1, bias=False)
        self.mlp_narrow = nn.Linear(HIDDEN, 3, bias=False)
        self.mlp_narrow_back = nn.Linear(3, HIDDEN, bias=False)
        self.mlp_experts = Experts()
        self.mlp_experts_back = nn.Linear(11, HIDDEN, bias=False)
        self.norm = nn.LayerNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        if frozen:
            self.mlp_square.weight.requires_grad_(False)
        if unused:
            self.mlp_unused = nn.Linear(HIDDEN, 9, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> CausalLMOutput:
        x = self.embed_tokens(input_ids)  # (sequences, length, HIDDEN)
        x = x + self.mlp_square(torch.tanh(x)) * torch.sigmoid(self.mlp_row(x))
        x = x + self.mlp_wide(torch.tanh(self.mlp_tall(x)))
        x = x + self.mlp_narrow_back(torch.tanh(self.mlp_narrow(x)))
        x = x + self.mlp_experts_back(self.mlp_experts(x))
        return next_token_loss(self.lm_head(self.norm(x)), labels)


class Experts(nn.Module):
    """Batched experts, all of them averaged: one three-dimensional weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(EXPERTS, 11, HIDDEN))
        nn.init.normal_(self.weight, std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("slh,ekh->slek", x, self.weight)).mean(2)


class LayeredModel(nn.Module):
    """Two numbered layers with a wide, a tall and a square matrix each: none too small for factors of rank 5."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm = nn.LayerNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> CausalLMOutput:
        x = self.embed_tokens(input_ids)  # (sequences, length, HIDDEN)
        for layer in self.layers:
            x = layer(x)
        return next_token_loss(self.lm_head(self.norm(x)), labels)


class Layer(nn.Module):
    """A mixer of hidden units, and what makes each token see the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.attn_before = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.mlp_tall = nn.Linear(HIDDEN, 33)
        self.mlp_wide = nn.Linear(33, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = y + torch.tanh(self.attn_before(y.roll(1, dims=1)))
        return x + self.mlp_wide(torch.tanh(self.mlp_tall(y)))


def next_token_loss(logits: Tensor, labels: Tensor) -> CausalLMOutput:
    """The cross entropy of each token from what comes before it."""
    loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))
    return CausalLMOutput(loss=loss, logits=logits)


def odd_model(**variant: bool) -> OddModel:
    """The same weights in every process."""
    torch.manual_seed(0)
    return OddModel(**variant)


def layered_model() -> LayeredModel:
    """The same weights in every process."""
    torch.manual_seed(0)
    return LayeredModel()

"""One key/value head out of those of a group of query heads: the five starts of an uptraining, as mathematics on float64 tensors.

The group's attention should change as little as possible. What may be absorbed where: values and output commute with any linear
map; queries and keys, rotated by RoPE, only with one complex factor per frequency plane (dimensions f and f + R/2 of a head,
Hugging Face's pairing); the dimensions that RoPE leaves alone with any linear map again. RMSNorm on queries and keys (Qwen3)
breaks all of these but a sign per plane, because its weights differ between dimensions: keys are then aligned by signs only.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

Init = Literal["random", "first", "mean", "procrustes", "svd"]
INITS: tuple[Init, ...] = get_args(Init)
NEED_STATISTICS: frozenset[Init] = frozenset({"procrustes", "svd"})
_FLOOR = 1e-6  # of a second moment's largest eigenvalue: directions that calibration hardly saw are weighted no lower than this
_ROUNDS = 20  # of the generalized Procrustes iteration


@dataclass(frozen=True)
class Heads:
    """Weights of n query heads and the key and value head of each. I: hidden size, one more if there are biases (input 1)."""

    q: Tensor  # [n, D, I]
    k: Tensor  # [n, D, I]; [D, I] once merged
    v: Tensor  # [n, D, I]; [D, I] once merged
    o: Tensor  # [n, D, hidden]: the head's rows of the output projection, transposed

    def take(self, heads: list[int]) -> "Heads":
        """Those of some query heads, in that order."""
        return Heads(self.q[heads], self.k[heads], self.v[heads], self.o[heads])


@dataclass(frozen=True)
class Moments:
    """Second moments over calibration tokens, float64, of what a layer's heads see."""

    inputs: Tensor  # [I, I]: E[x x^T] of the layer's normed inputs
    attended: Tensor  # [n, I, I]: E[z z^T], z the inputs averaged with the head's attention weights
    queries: Tensor  # [n, D, D]: E[q q^T], after any q norm, before RoPE

    def take(self, heads: list[int]) -> "Moments":
        """Those of some query heads, in that order."""
        return Moments(self.inputs, self.attended[heads], self.queries[heads])


@dataclass(frozen=True)
class Geometry:
    """How a head's dimensions are used: the first `rotary_dim` are rotated by RoPE; `qk_norm`: RMSNorm on queries and keys."""

    rotary_dim: int
    qk_norm: bool = False


def first(heads: Heads) -> Heads:
    """The group's first key and value head (Ainslie et al. 2023, section 2.1)."""
    return replace(heads, k=heads.k[0], v=heads.v[0])


def mean(heads: Heads) -> Heads:
    """The mean of the group's key and value heads (Ainslie et al. 2023, section 2.1)."""
    return replace(heads, k=heads.k.mean(0), v=heads.v.mean(0))


def random(heads: Heads, generator: torch.Generator) -> Heads:
    """Normal keys and values of the group's own root mean square (Ainslie et al. 2023, section 2.1: from scratch)."""
    k, v = (
        torch.randn(w.shape[1:], generator=generator, dtype=w.dtype) * w.pow(2).mean().sqrt()
        for w in (heads.k, heads.v)
    )
    return replace(heads, k=k, v=v)


def procrustes(heads: Heads, moments: Moments, geometry: Geometry) -> Heads:
    """The mean of heads that were first rotated onto each other, on activations (Jin et al. 2024, arXiv 2412.20677, section 3).

    Generalized Procrustes analysis; the inner products of activations are those of weights under the inputs' second moment.
    """
    inputs, rotary = moments.inputs, geometry.rotary_dim
    turns, v = _rotations(heads.v, inputs)
    o = turns @ heads.o  # v' = T v and o' = T o: o'^T v' = o^T v
    k_planes, q_planes = planes(heads.k, rotary), planes(heads.q, rotary)  # [n, R/2, I]
    phases = (_signs if geometry.qk_norm else _phases)(k_planes, inputs)  # [n, R/2]
    k_rotated = dimensions((phases[..., None] * k_planes).mean(0))
    q_rotated = dimensions(phases[..., None] * q_planes)
    k_rest, q_rest = heads.k[:, rotary:], heads.q[:, rotary:]  # [n, U, I]
    if geometry.qk_norm or not k_rest.shape[1]:
        k_plain = k_rest.mean(0)
    else:
        turns, k_plain = _rotations(k_rest, inputs)
        q_rest = turns @ q_rest
    return Heads(torch.cat((q_rotated, q_rest), 1), torch.cat((k_rotated, k_plain)), v, o)


def svd(heads: Heads, moments: Moments, geometry: Geometry) -> Heads:
    """The key and value head that lose least, with queries and output absorbing the factors.

    Values: the group's maps o_i^T v_i, weighted with the second moment of the attended inputs, have a common row space of D
    dimensions that is best in least squares: the leading singular vectors. Keys: in each RoPE plane the heads' complex rows,
    weighted with the energy of their queries and the inputs' second moment, are approximated by rank 1; the factors go to the
    queries. At one head per group, or where the heads of a group are equal, this is the identity.
    """
    v, o = _svd_values(heads.v, heads.o, moments.attended)
    root, inverse = _roots(moments.inputs)
    rotary = geometry.rotary_dim
    energies = _energies(moments.queries, rotary)  # [n, R/2]
    if geometry.qk_norm:
        return Heads(*_signed_keys(heads, moments.inputs, energies, rotary), v, o)
    k_rotated, factors = _svd_planes(planes(heads.k, rotary), energies, root, inverse)
    q_rotated = factors.conj()[..., None] * planes(heads.q, rotary)  # Re(q* c k) = Re((c* q)* k)
    k_rest, q_rest = heads.k[:, rotary:], heads.q[:, rotary:]  # [n, U, I]
    if k_rest.shape[1]:
        k_plain, maps = _svd_plain(k_rest, moments.queries[:, rotary:, rotary:], root, inverse)
        q_rest = maps.mT @ q_rest
    else:
        k_plain = k_rest[0]
    return Heads(torch.cat((dimensions(q_rotated), q_rest), 1), torch.cat((dimensions(k_rotated), k_plain)), v, o)


def planes(weight: Tensor, rotary_dim: int) -> Tensor:
    """The rotated rows of heads [..., D, I] as complex rows per RoPE plane, [..., R/2, I]."""
    half = rotary_dim // 2
    return torch.complex(weight[..., :half, :], weight[..., half:rotary_dim, :])


def dimensions(weight: Tensor) -> Tensor:
    """The inverse of `planes`: [..., R/2, I] complex to [..., R, I]."""
    return torch.cat((weight.real, weight.imag), -2)


def root(moment: Tensor) -> Tensor:
    """Square root of a symmetric positive matrix, its small eigenvalues floored."""
    return _roots(moment)[0]


def value_loss(v: Tensor, o: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """What a shared value head of n heads would lose at least, and the whole, as squared norms weighted with `root`: that of
    the second moment of their attended inputs.
    """
    energy = torch.linalg.svdvals(_value_core(v, o, root)[1]).square()
    return energy[v.shape[1] :].sum(), energy.sum()


def key_loss(k: Tensor, queries: Tensor, root: Tensor, rotary_dim: int) -> tuple[Tensor, Tensor]:
    """The same of a shared key head, over the rotated dimensions; `root` is that of the inputs' second moment."""
    rows = _energies(queries, rotary_dim).sqrt()[..., None] * (planes(k, rotary_dim) @ root.to(torch.complex128))
    gram = torch.einsum("ifc,jfc->fij", rows, rows.conj())  # [R/2, n, n]
    whole = gram.diagonal(dim1=1, dim2=2).real.sum()
    return whole - torch.linalg.eigvalsh(gram)[:, -1].sum(), whole


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """See `root`; and its inverse."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=(values[-1] * _FLOOR).clamp(min=1e-30)).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def _energies(queries: Tensor, rotary_dim: int) -> Tensor:
    """E|q|^2 of each head's planes, [n, R/2], from [n, D, D]; at least a trifle, so that no plane is without weight."""
    half = rotary_dim // 2
    diagonal = queries.diagonal(dim1=1, dim2=2)  # [n, D]
    energies = diagonal[:, :half] + diagonal[:, half:rotary_dim]
    return energies.clamp(min=(energies.max() * _FLOOR).clamp(min=1e-30).item())


def _value_core(v: Tensor, o: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis [I, r] of the weighted rows of all v, and the weighted maps [o_i^T v_i] in it, small: [r, n D].

    Only norms and left singular vectors of the maps matter, so each o_i is reduced to the triangle of its QR factors.
    """
    basis, rows = torch.linalg.qr(root @ v.flatten(0, 1).T)  # [I, r], [r, n D]
    triangles = torch.linalg.qr(o.mT, mode="r").R.mT  # [n, D, min(D, hidden)]
    parts = rows.reshape(rows.shape[0], *v.shape[:2]).transpose(0, 1)  # [n, r, D]
    return basis, torch.cat(tuple(parts @ triangles), 1)


def _svd_values(v: Tensor, o: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
    """The shared value rows [D, I] and each head's output rows [n, D, hidden]."""
    dim = v.shape[1]
    root, inverse = _roots(attended.mean(0))
    basis, core = _value_core(v, o, root)
    directions = basis @ torch.linalg.svd(core, full_matrices=False).U[:, :dim]  # [I, D], orthonormal
    shared = (inverse @ directions).T  # [D, I]
    outputs = directions.T @ root @ v.mT @ o  # [n, D, hidden]: the best in the group's common metric
    gram = shared @ attended @ shared.T  # [n, D, D]
    missing = shared @ attended @ v.mT @ o - gram @ outputs  # then each head's best in its own
    ridge = _FLOOR * gram.diagonal(dim1=1, dim2=2).mean() * torch.eye(dim, dtype=v.dtype)
    outputs = outputs + torch.linalg.solve(gram + ridge, missing)
    scale = (v.pow(2).sum() / len(v) / shared.pow(2).sum()).sqrt()  # values keep the size they had
    return shared * scale, outputs / scale


def _svd_planes(k: Tensor, energies: Tensor, root: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """The shared key's complex rows [R/2, I], and the factor c of each head's plane, [n, R/2], with k_i = c_i k."""
    rows = k @ root.to(k.dtype)  # [n, R/2, I]
    weighted = (energies.sqrt()[..., None] * rows).transpose(0, 1)  # [R/2, n, I]
    leading = torch.linalg.svd(weighted, full_matrices=False).Vh[:, 0]  # [R/2, I]
    factors = torch.einsum("nfi,fi->nf", rows, leading.conj())
    total = factors.sum(0)  # the phase is free: the one in which the heads' factors add up to a positive number
    phase = torch.where(total.abs() > 0, total / total.abs(), torch.ones_like(total))
    shared = (leading * phase[:, None]) @ inverse.to(k.dtype)
    size = k.abs().pow(2).sum(-1).mean(0).sqrt() / shared.abs().pow(2).sum(-1).sqrt()  # keys keep the size they had
    size = torch.where(size > 0, size, torch.ones_like(size))
    return shared * size[:, None], factors * phase.conj() / size


def _svd_plain(k: Tensor, queries: Tensor, root: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Dimensions without RoPE: the shared key's rows [U, I], and each head's map T [n, U, U], with k_i = T_i k."""
    rows = k @ root  # [n, U, I]
    weights = torch.stack([_roots(moment)[0] for moment in queries])  # [n, U, U]
    leading = torch.linalg.svd((weights @ rows).flatten(0, 1), full_matrices=False).Vh[: k.shape[1]]  # [U, I]
    shared = leading @ inverse
    size = (k.pow(2).sum() / len(k) / shared.pow(2).sum()).sqrt()
    return shared * size, rows @ leading.T / size


def _signed_keys(heads: Heads, inputs: Tensor, energies: Tensor, rotary_dim: int) -> tuple[Tensor, Tensor]:
    """What RMSNorm on queries and keys leaves: heads of equal size, a sign per plane, their mean weighted by query energy."""
    size = ((heads.k @ inputs) * heads.k).sum((1, 2)).clamp(min=1e-30).sqrt()[:, None, None]  # the norm takes it out
    k = heads.k * (size.mean() / size)
    k_planes = planes(k, rotary_dim)
    signs = _signs(k_planes, inputs)  # [n, R/2]
    shares = (energies / energies.sum(0))[..., None]  # [n, R/2, 1]
    rotated = dimensions((shares * signs[..., None] * k_planes).sum(0))
    queries = dimensions(signs[..., None] * planes(heads.q, rotary_dim))
    return torch.cat((queries, heads.q[:, rotary_dim:]), 1), torch.cat((rotated, k[:, rotary_dim:].mean(0)))


def _rotations(weight: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Orthogonal T_i [n, D, D] that bring heads [n, D, I] onto their mean, and that mean of T_i w_i, [D, I]."""
    mean, weighted = weight[0], moment @ weight.mT  # [n, I, D]
    for _ in range(_ROUNDS):
        left, _, right = torch.linalg.svd(mean @ weighted)
        turns = left @ right  # [n, D, D]
        mean = (turns @ weight).mean(0)
    return turns, mean


def _phases(k: Tensor, moment: Tensor) -> Tensor:
    """Factors of modulus 1, [n, R/2], that bring the heads' planes [n, R/2, I] onto their mean."""
    mean, weighted = k[0], k.conj() @ moment.to(k.dtype)
    for _ in range(_ROUNDS):
        product = (weighted * mean).sum(-1)  # [n, R/2]
        phases = torch.where(product.abs() > 0, product / product.abs(), torch.ones_like(product))
        mean = (phases[..., None] * k).mean(0)
    return phases


def _signs(k: Tensor, moment: Tensor) -> Tensor:
    """The same with 1 and -1 only."""
    mean, weighted = k[0], k.conj() @ moment.to(k.dtype)
    for _ in range(_ROUNDS):
        signs = torch.where((weighted * mean).sum(-1).real < 0, -1.0, 1.0).to(moment.dtype)
        mean = (signs[..., None] * k).mean(0)
    return signs

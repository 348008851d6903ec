"""Masked image modeling, one class a paper, on a plain Vision Transformer.

Contents. To copy a paper, copy the imports, the paper's section and the sections that it uses.

     section                       holds                                                   uses
     1. Checks of arguments        errors that name the argument
     2. Patches and index tensors  patchify, take, put
     3. Vision Transformer         ViT, its blocks and attentions                          1, 2
     4. Losses and pictures        pixel, token and region loss; what a prediction shows   1-3
     5. Random masking             counts, random_masking, units of patches                1, 2
     6. MAE                        MAE                                                     1-5
     7. SimMIM                     unit_masking, SimMIM                                    1-5
     8. Block-wise masking         block_masking                                           1
     9. BEiT                       BEiT                                                    1-5, 8
    10. CAE                        RegressorBlock, CAE                                     1-5, 8
    11. AMT                        attention_masking, crop_maps, AMT around a method       1, 2, 5
    12. LoMaR                      window_masking, LoMaR                                   1-5
    13. Label maps                 areas and binary maps of regions
    14. ObjMAE                     its selection, division and alignment; ObjMAE           1-6, 13
    15. R-MAE and RAE              sample_regions, three region branches, RMAE, RAE        1-6, 13
    16. Tokenizer                  DVAE                                                    1, 2
    17. Loading weights            of this project, of the MAE release, of timm            1-3
    18. The methods by name        METHODS                                                 all

Notation: B images [B, C, H, W] of C channels; p the side of a patch in pixels; N = gh * gw patches on a
(gh, gw) grid, numbered in raster order; D the encoder's width; V the size of a vocabulary; `ids_*` int64
index tensors [B, n] with values in 0..N-1. Each paper's section begins with a table of the paper's symbols.

A method is built around an encoder: `MAE(ViT(...))`. Its forward takes the images, whatever else the paper
needs, and optionally the mask to use (`ids_visible`, `ids_masked`); without it a new mask is drawn. It
returns a dict: `loss` and its parts; `pred`, pixels [B, n_masked, p*p*C] or logits of tokens
[B, n_masked, V] (RAE has `pred_regions` instead); `ids_visible`, `ids_masked`. DVAE, the tokenizer, has a
dict of its own. Two class attributes tell a training program what to prepare:
    inputs           the arguments of forward that it fills in besides images and tokens
    encoder_options  the options of the paper's encoder besides its size

ViT offers all that the methods ask of an encoder. Any other module will do if it has what its method reads:
    all but AMT             embed_dim, patch_size, patch_dim (p*p*C), grid (gh, gw), num_patches (N)
    MAE, RAE, RMAE          forward(images, ids) -> latents [B, 1+n, D] of a class token and the patches `ids`
    ObjMAE                  forward(images, ids, keep); keep [B, n] bool or None, see `ViT.encode`
    SimMIM, BEiT            embed(images) -> [B, N, D]; encode(tokens, ids=None) -> [B, 1+n, D], see `ViT`
    CAE                     these two; pos_embed [1, 1+N, D], relative_position = False; num_heads,
                            layer_scale, drop_path for its other blocks
    LoMaR                   embed; encode(tokens, buckets=...); relative_position = True, image_size
    AMT, besides its base   grid, last_attention(images) -> [B, heads, N]
"""

import argparse
import math
import os
import re
from collections import OrderedDict
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth, roi_align

# ---------------------------------------------------------------------------------------------------------
# 1. Checks of arguments


def check_range(minimum, maximum=math.inf, **arguments):
    """Raises a ValueError that names the first argument that is no finite number in minimum..maximum."""
    for name, value in arguments.items():
        if not (minimum <= value <= maximum and math.isfinite(value)):  # nan fails every comparison
            limits = f"at least {minimum}" if maximum == math.inf else f"in {minimum}..{maximum}"
            raise ValueError(f"{name} must be {limits}, got {value}")


def check_choice(name, value, choices):
    """Raises a ValueError if `value` is none of the values of the Literal type `choices`."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be {' or '.join(get_args(choices))}, got {value!r}")


def check_transformer(dim, num_heads, depth, names=("embed_dim", "num_heads", "depth")):
    """Raises a ValueError if these cannot be a transformer's width, number of heads and depth.

    names: the names of the three arguments, as the user knows them.
    """
    check_range(1, **dict(zip(names, (dim, num_heads, depth))))
    if dim % 4 or dim % num_heads:
        raise ValueError(f"{names[0]} must be divisible by 4 and by {names[1]}={num_heads}, got {dim}")


def no_mask(ids_visible, ids_masked):
    """True if a mask is to be drawn, as neither is given. Raises a ValueError if one is given alone."""
    if (ids_visible is None) != (ids_masked is None):
        raise ValueError("ids_visible and ids_masked must be given together, or neither")
    return ids_visible is None


# ---------------------------------------------------------------------------------------------------------
# 2. Patches and index tensors


def patchify(images, patch_size):
    """Images [B, C, H, W] -> patches [B, N, p*p*C] in raster order; inside a patch row, column, channel.

    >>> image = torch.arange(16).view(1, 1, 4, 4)  # 0 1 2 3 in the first row, 4 5 6 7 in the second
    >>> patchify(image, patch_size=2).tolist()
    [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]
    """
    B, C, H, W = images.shape
    p = patch_size
    if H % p or W % p:
        raise ValueError(f"image height and width must be divisible by patch_size={p}, got {H}x{W}")
    x = images.reshape(B, C, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)


def unpatchify(patches, patch_size, grid):
    """Patches [B, N, p*p*C] -> images [B, C, gh*p, gw*p], the inverse of `patchify` for a (gh, gw) grid.

    >>> unpatchify(torch.tensor([[[0, 1, 4, 5], [2, 3, 6, 7]]]), patch_size=2, grid=(1, 2)).tolist()
    [[[[0, 1, 2, 3], [4, 5, 6, 7]]]]
    """
    (B, _, width), (gh, gw), p = patches.shape, grid, patch_size
    x = patches.reshape(B, gh, gw, p, p, width // p**2)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, gh * p, gw * p)


def take(x, ids):
    """Returns the rows `ids` [B, n], or [1, n] for all, of x [B, N, D]: [B, n, D].

    >>> x = torch.tensor([[[0, 0], [1, 1], [2, 2]]])
    >>> take(x, torch.tensor([[2, 0]])).tolist()
    [[[2, 2], [0, 0]]]
    """
    return x.gather(1, ids[..., None].expand(len(x), -1, x.shape[-1]))


def put(x, ids, rows):
    """Returns a copy of x [B, N, D] in which the rows `ids` [B, n] are `rows`, broadcast to [B, n, D].

    >>> x = torch.tensor([[[0, 0], [1, 1], [2, 2]]])
    >>> put(x, torch.tensor([[2, 0]]), torch.tensor([[[7, 7], [8, 8]]])).tolist()
    [[[8, 8], [1, 1], [7, 7]]]
    """
    ids = ids[..., None].expand(len(x), -1, x.shape[-1])
    return x.scatter(1, ids, rows.expand_as(ids).to(x.dtype))  # so that gradients add up in rows' precision


def pair(size):
    """An int or a (height, width) pair -> (height, width)."""
    return (size, size) if isinstance(size, int) else tuple(size)


# ---------------------------------------------------------------------------------------------------------
# 3. Vision Transformer


def sincos_position_embedding(dim, grid):
    """Fixed 2-D sine-cosine table [1, 1 + gh*gw, dim] for a (gh, gw) grid; the class token's row is zero.

    dim is divisible by 4. The first half of the channels encodes the column, the second half the row. Inside
    a half all sines come first, then all cosines, at frequencies 1 / 10000^(i / (dim/4)).
    """
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(*(torch.arange(g, dtype=torch.float64) for g in grid), indexing="ij")
    angles = [torch.outer(x.flatten(), omega) for x in (column, row)]
    table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)
    return F.pad(table.float(), (0, 0, 1, 0))[None]


NUM_BUCKETS = 50  # 7 x 7 classes of offsets, and one for all pairs with the class token


def relative_buckets(grid):
    """Returns the class of relative position of every two tokens, [1+N, 1+N] in 0..49; token 0 is the class
    token.

    iRPE's product method: the row offset and the column offset each become an index in -3..3, which is exact
    for near patches and logarithmic for far ones (alpha 1.9, beta 3.8, gamma 15.2). So one table of 50 rows
    serves grids of any size. An offset is key minus query, j - i; LoMaR's authors mirror the table: i - j.

    >>> relative_buckets((1, 3)).tolist()  # three patches in a row: 24 is a patch itself, 25 the next one
    [[49, 49, 49, 49], [49, 24, 25, 26], [49, 23, 24, 25], [49, 22, 23, 24]]
    >>> relative_buckets((1, 8))[1, 1:].tolist()  # from the first of eight to all: the far ones share a class
    [24, 25, 26, 26, 27, 27, 27, 27]
    """
    alpha, beta, gamma = 1.9, 3.8, 15.2

    def piecewise(size):
        offset = (torch.arange(size)[None, :] - torch.arange(size)[:, None]).double()
        far = alpha + (offset.abs().clamp(min=1) / alpha).log() / math.log(gamma / alpha) * (beta - alpha)
        index = torch.where(offset.abs() <= alpha, offset, offset.sign() * far.round().clamp(max=beta))
        return index.long() + 3

    (gh, gw), (rows, columns) = grid, (piecewise(g) for g in grid)
    pairs = rows[:, None, :, None] * 7 + columns[None, :, None, :]
    return F.pad(pairs.reshape(gh * gw, gh * gw), (1, 0, 1, 0), value=NUM_BUCKETS - 1)


def layer_norm(dim):
    """LayerNorm with the epsilon 1e-6 of the ViTs of all these papers; PyTorch's own default is 1e-5."""
    return nn.LayerNorm(dim, eps=1e-6)


class Attention(nn.Module):
    """Multi-head self-attention, [B, L, D] -> [B, L, D].

    relative_position: adds q_i . r[bucket(i, j)] to the logits. r is a learned table, shared by the heads:
        contextual relative position encoding on the keys (Wu et al., ICCV 2021, arXiv:2107.14222, product
        method). r[bucket(i, j)] is LoMaR's r_ij (§3.2). Wu et al. divide both terms by sqrt(d). LoMaR's code
        divides the first one alone, and so does this.

    forward takes `buckets` [L, L], the classes of relative position, where the module has such a table; and
    `keep` [B, L] bool, the tokens that may be attended to (None: all).
    """

    def __init__(self, dim, num_heads, relative_position=False):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if relative_position:
            self.relative_table = nn.Parameter(torch.zeros(NUM_BUCKETS, dim // num_heads))

    def split_heads(self, x):
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def relative_bias(self, q, buckets):
        """q [B, heads, l, d], buckets [l, L] -> q_i . r[bucket(i, j)], [B, heads, l, L]."""
        products = q @ self.relative_table.to(q.dtype).T
        # The backward pass sums what many keys give to one bucket, which half precision could not.
        return products.float().gather(-1, buckets.expand(*q.shape[:2], -1, -1)).to(q.dtype)

    def forward(self, x, buckets=None, keep=None):
        q, k, v = self.split_heads(x)
        mask = None if keep is None else keep[:, None, None]
        if buckets is not None:
            bias = self.relative_bias(q, buckets)
            mask = bias if keep is None else bias.masked_fill(~mask, -math.inf)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return self.proj(x)

    def weights(self, x, query=slice(None), buckets=None):
        """Attention of the tokens `query`, a slice, to all tokens: [B, heads, l, L], rows sum to one.

        This is A_i of AMT's Eq. 3. forward never makes it: scaled_dot_product_attention is faster.
        """
        q, k, _ = self.split_heads(x)
        q = q[:, :, query]
        logits = (q @ k.transpose(-2, -1)).float() / math.sqrt(q.shape[-1])
        if buckets is not None:
            logits = logits + self.relative_bias(q, buckets[query])
        return logits.softmax(-1)


class CrossAttention(nn.Module):
    """Multi-head attention of q [B, m, D] to k, v [B, n, D] -> [B, m, D]; each of the three has its own norm.

    norm_context: False for keys and values that are normed already.
    """

    def __init__(self, dim, num_heads, norm_context=True):
        super().__init__()
        check_transformer(dim, num_heads, 1)
        self.num_heads = num_heads
        self.norm_q = layer_norm(dim)
        self.norm_k, self.norm_v = (layer_norm(dim) if norm_context else nn.Identity() for _ in range(2))
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def split_heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, q, k, v):
        q, k, v = self.q(self.norm_q(q)), self.k(self.norm_k(k)), self.v(self.norm_v(v))
        x = F.scaled_dot_product_attention(*(self.split_heads(x) for x in (q, k, v)))
        return self.proj(x.transpose(1, 2).flatten(2))

    def weights(self, q, k):
        """Attention of each q to each k: [B, heads, m, n], rows sum to one."""
        q, k = self.split_heads(self.q(self.norm_q(q))), self.split_heads(self.k(self.norm_k(k)))
        return ((q @ k.transpose(-2, -1)).float() / math.sqrt(q.shape[-1])).softmax(-1)


class LayerScale(nn.Module):
    """A learned factor for each channel (Touvron et al., ICCV 2021, arXiv:2103.17239)."""

    def __init__(self, dim, init):
        super().__init__()
        self.gamma = nn.Parameter(init * torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block, [B, L, D] -> [B, L, D]; buckets, keep: see `Attention`."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0, relative_position=False, layer_scale=None):
        super().__init__()
        self.norm1 = layer_norm(dim)
        self.attn = Attention(dim, num_heads, relative_position)
        self.norm2 = layer_norm(dim)
        hidden_dim = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, hidden_dim), act=nn.GELU(), fc2=nn.Linear(hidden_dim, dim)))
        self.ls1, self.ls2 = (
            nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale) for _ in range(2))
        self.drop_path = nn.Identity()

    def forward(self, x, buckets=None, keep=None):
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), buckets, keep)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


def set_drop_path(blocks, drop_path):
    """Gives the blocks stochastic depth, with a rate that grows linearly from 0 to `drop_path`."""
    check_range(0, 1, drop_path=drop_path)
    for i, block in enumerate(blocks):
        block.drop_path = StochasticDepth(drop_path * i / max(1, len(blocks) - 1), "row")


def init_weights(module):
    """Xavier-uniform weights and zero biases of linear layers, for `module.apply(init_weights)`.

    The patch projection, a convolution, is initialised as the linear layer of whole patches that it is.
    """
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        nn.init.zeros_(module.bias)


def learned_token(dim):
    """A class token or mask token: a parameter [1, 1, dim], normal with standard deviation 0.02."""
    return nn.Parameter(torch.randn(1, 1, dim) * 0.02)


def rescale_projections(blocks):
    """Divides the output projections of block i = 1, 2, ... by sqrt(2 i), as BEiT's code initialises them.

    In CAE's released ViT-B run a later initialisation undoes this. In its ViT-L script it is meant to stay,
    but a missing backslash cuts off the flag.
    """
    for i, block in enumerate(blocks, start=1):
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.data /= math.sqrt(2 * i)


Pool = Literal["cls", "mean"]


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al., ICLR 2021, arXiv:2010.11929) as MAE sets it up.

    Pre-norm blocks, a class token, a fixed sine-cosine position embedding. Parameters have the names and
    shapes of timm's VisionTransformer, so that weights can go both ways with `strict=True` (layer_scale is
    timm's init_values; timm has no counterpart of relative_position).

    image_size: pixels, an int or (height, width), divisible by patch_size
    patch_size: side of a patch, in pixels
    embed_dim: width
    depth: number of blocks
    num_heads: attention heads of a block
    mlp_ratio: width of a block's hidden layer, in multiples of embed_dim
    drop_path: stochastic depth of the last block; it grows linearly from 0 over the blocks
    relative_position: relative positions in every block instead of the position embedding, as LoMaR has them
    layer_scale: initial value of a learned factor per channel on both branches of every block; with it the
        blocks' output projections start smaller, too, as in BEiT. None: no factor, usual projections
    channels: channels of the images, C; 1 for grey ones
    """

    def __init__(self, image_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0,
                 drop_path=0.0, relative_position=False, layer_scale=None, channels=3):
        super().__init__()
        check_range(1, patch_size=patch_size, channels=channels)
        check_transformer(embed_dim, num_heads, depth)
        H, W = self.image_size = pair(image_size)
        if min(H, W) < 1 or H % patch_size or W % patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size={patch_size}, got {H}x{W}")
        self.patch_size, self.embed_dim, self.num_heads = patch_size, embed_dim, num_heads
        self.drop_path, self.layer_scale = drop_path, layer_scale
        self.grid = H // patch_size, W // patch_size
        self.num_patches = math.prod(self.grid)
        self.channels, self.patch_dim = channels, patch_size**2 * channels
        projection = nn.Conv2d(channels, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=projection))  # so that it has timm's name
        self.cls_token = learned_token(embed_dim)
        self.relative_position = relative_position
        buckets = relative_buckets(self.grid) if relative_position else None
        self.register_buffer("buckets", buckets, persistent=False)
        if not relative_position:
            self.pos_embed = nn.Parameter(
                sincos_position_embedding(embed_dim, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, relative_position, layer_scale) for _ in range(depth))
        self.norm = layer_norm(embed_dim)
        set_drop_path(self.blocks, drop_path)
        self.apply(init_weights)
        if layer_scale is not None:
            rescale_projections(self.blocks)

    def embed(self, images):
        """Images [B, C, H, W] -> patch embeddings [B, N, D], without positions."""
        if images.shape[1:] != (self.channels, *self.image_size):
            raise ValueError(f"this ViT takes images of {self.channels} channels, height and width "
                             f"{self.image_size}, got {list(images.shape)}")
        return self.patch_embed(images).flatten(2).transpose(1, 2)

    def sequence(self, tokens, ids=None):
        """Patch embeddings [B, N, D] -> the blocks' input [B, 1+n, D] (AMT, Eq. 1).

        Positions are added first. Then the patches `ids` are chosen, and the class token comes before them.
        """
        cls = self.cls_token
        if not self.relative_position:
            tokens, cls = tokens + self.pos_embed[:, 1:], cls + self.pos_embed[:, :1]
        if ids is not None:
            tokens = take(tokens, ids)
        return torch.cat([cls.expand(len(tokens), -1, -1), tokens.to(cls.dtype)], dim=1)

    def encode(self, tokens, ids=None, buckets=None, keep=None):
        """Patch embeddings [B, N, D] (masked ones may have been replaced) -> latents [B, 1+n, D].

        ids: [B, n], the patches to encode; None for all.
        buckets: with relative positions, the `relative_buckets` of the patches `ids` if they are not all.
        keep: [B, n] bool, True for the patches that may be attended to; None for all.
        """
        x = self.sequence(tokens, ids)
        if buckets is None:
            if self.relative_position and ids is not None:
                raise ValueError("a ViT with relative positions needs the buckets of the chosen patches")
            buckets = self.buckets
        if keep is not None:
            keep = F.pad(keep, (1, 0), value=True)  # the class token always may
        for block in self.blocks:
            x = block(x, buckets, keep)
        return self.norm(x)

    def forward(self, images, ids=None, keep=None):
        """Images [B, C, H, W] -> latents [B, 1+n, D] of class token and patches `ids` [B, n] (None: all).

        keep: see `encode`.
        """
        return self.encode(self.embed(images), ids, keep=keep)

    def features(self, images, pool="cls"):
        """One vector per image, [B, D], after the last norm: the class token, or the mean of the patches.

        MAE's and BEiT's own global pooling takes the mean before the norm.
        """
        check_choice("pool", pool, Pool)
        x = self(images)
        return x[:, 0] if pool == "cls" else x[:, 1:].mean(1)

    def last_attention(self, images, query=0):
        """Attention of one token to the patches in the last block: [B, heads, N].

        query: the token: 0 for the class token, 1+i for patch i.
        """
        x = self.sequence(self.embed(images))
        for block in self.blocks[:-1]:
            x = block(x, self.buckets)
        block = self.blocks[-1]
        return block.attn.weights(block.norm1(x), slice(query, query + 1), self.buckets)[:, :, 0, 1:]

    def rollout(self, images):
        """Attention rollout [B, 1+N, 1+N]: row i has the share of each input token in output token i.

        Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, arXiv:2005.00928: the mean
        of the heads, plus the identity for the residual connection, normalised, multiplied over all blocks.
        """
        x = self.sequence(self.embed(images))
        identity = flow = torch.eye(x.shape[1], device=x.device)
        for block in self.blocks:
            attention = block.attn.weights(block.norm1(x), buckets=self.buckets).mean(1)
            with torch.autocast(images.device.type, enabled=False):  # in float32, as rows sum to one
                flow = (attention + identity) / 2 @ flow
            x = block(x, self.buckets)
        return flow


SIZES = {  # `nano` is for CPUs and tests, the others are the literature's
    "nano": dict(embed_dim=128, depth=6, num_heads=4),
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16),  # with patch_size=14
}

# ---------------------------------------------------------------------------------------------------------
# 4. Losses and pictures


def patch_statistics(patches):
    """Mean and sqrt(unbiased variance + 1e-6) of each patch, [B, n, 1] each (MAE's `norm_pix_loss`)."""
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (var + 1e-6).sqrt()


def pixel_loss(pred, target, norm_pix=False, distance=F.mse_loss, keep=None):
    """Mean error of predicted patches [B, n, p*p*C] against true ones, in float32 (AMT, Eq. 2).

    norm_pix: the prediction is of each true patch minus its mean, divided by its standard deviation.
    distance: F.mse_loss, or F.l1_loss for SimMIM.
    keep: [B, n] bool, the patches that count; None for all.
    """
    pred, target = pred.float(), target.float()
    if norm_pix:
        mean, std = patch_statistics(target)
        target = (target - mean) / std
    error = distance(pred, target, reduction="none").mean(-1)
    return error.mean() if keep is None else (error * keep).sum() / keep.sum()


def token_loss(logits, tokens):
    """Mean cross-entropy, in nats, of logits [B, n, V] against tokens [B, n] in 0..V-1, in float32."""
    return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())


def region_loss(pred, target):
    """Binary cross-entropy of logits [..., n, p*p] against region patches of 0 and 1, in float32 (R-MAE,
    §3.1)."""
    return F.binary_cross_entropy_with_logits(pred.float(), target.float())


class TargetHead(nn.Linear):
    """The last layer, and the loss, of a method that predicts tokens or pixels (LoMaR, BEiT, CAE).

    Latents [B, n, D] -> pred: logits [B, n, V] of vocab_size tokens, or pixels [B, n, p*p*C] if that is None.
    """

    def __init__(self, encoder, vocab_size=None, norm_pix=True):
        if vocab_size is not None:
            check_range(1, vocab_size=vocab_size)
        super().__init__(encoder.embed_dim, vocab_size or encoder.patch_dim)
        init_weights(self)
        self.patch_size, self.vocab_size, self.norm_pix = encoder.patch_size, vocab_size, norm_pix

    def loss(self, pred, images, tokens, ids):
        """pred [B, n, ...] of the patches `ids` -> loss, and dict(loss_pixel) or dict(loss_token, accuracy).

        tokens: [B, N] int64 of all patches, in raster order; None where pixels are predicted.
        """
        if (tokens is None) != (self.vocab_size is None):
            raise ValueError("tokens must be given if the method has a vocab_size, and only then; "
                             f"vocab_size is {self.vocab_size}")
        if tokens is None:
            loss = pixel_loss(pred, take(patchify(images, self.patch_size), ids), self.norm_pix)
            return loss, dict(loss_pixel=loss)
        height, width = images.shape[-2:]
        if tokens.shape != (len(images), height * width // self.patch_size**2):
            raise ValueError(f"tokens must be [B, N], one for each patch, got {list(tokens.shape)}")
        tokens = tokens.gather(1, ids.expand(len(tokens), -1))
        loss = token_loss(pred, tokens)
        return loss, dict(loss_token=loss, accuracy=(pred.argmax(-1) == tokens).float().mean())


def reconstruct(images, pred, ids_masked, patch_size, norm_pix=False):
    """Returns the images [B, C, H, W] with the patches `ids_masked` [B, n] replaced by `pred` [B, n, p*p*C].

    norm_pix: pred is of normalised patches, which look like noise. They get the true mean and deviation.
    """
    patches = patchify(images, patch_size)
    pred = pred.to(patches.dtype)
    if norm_pix:
        mean, std = patch_statistics(take(patches, ids_masked))
        pred = pred * std + mean
    grid = [side // patch_size for side in images.shape[-2:]]
    return unpatchify(put(patches, ids_masked, pred), patch_size, grid)


# ---------------------------------------------------------------------------------------------------------
# 5. Random masking


def count_share(total, ratio, round_up=False):
    """total * ratio, rounded down or up. The 1e-6 makes up for what floats lose.

    >>> int(100 * 0.29), count_share(100, 0.29)
    (28, 29)
    """
    return math.ceil(total * ratio - 1e-6) if round_up else int(total * ratio + 1e-6)


def count_masked(total, mask_ratio, round_up=False, name="mask_ratio"):
    """The number of masked ones of `total` patches or units. ValueError, with the ratio's name, if that is
    none or all of them."""
    check_range(0, 1, **{name: mask_ratio})
    masked = count_share(total, mask_ratio, round_up)
    if not 0 < masked < total:
        raise ValueError(f"{name}={mask_ratio} masks {masked} of {total}; "
                         "at least one must be masked and one visible")
    return masked


def random_masking(batch, num_patches, mask_ratio, device=None, generator=None):
    """Uniform masking (MAE, §3).

    Returns ids_visible [B, int(N * (1 - mask_ratio))] and ids_masked [B, the rest], in random order.

    >>> ids_visible, ids_masked = random_masking(batch=1, num_patches=8, mask_ratio=0.75)
    >>> len(ids_visible[0]), len(ids_masked[0]), sorted(ids_visible[0].tolist() + ids_masked[0].tolist())
    (2, 6, [0, 1, 2, 3, 4, 5, 6, 7])
    """
    visible = num_patches - count_masked(num_patches, mask_ratio, round_up=True)
    order = torch.rand(batch, num_patches, device=device, generator=generator).argsort(1)
    return order[:, :visible], order[:, visible:]


def units_to_patches(ids, grid, unit_size):
    """Indices [B, n] of units of u*u patches -> indices [B, n*u*u] of their patches on the (gh, gw) grid.

    >>> units_to_patches(torch.tensor([[0, 3]]), grid=(4, 4), unit_size=2).tolist()  # of four, first and last
    [[0, 1, 4, 5, 10, 11, 14, 15]]
    """
    numbers = torch.arange(math.prod(grid), device=ids.device).view(1, 1, *grid)
    return patchify(numbers, unit_size)[0, ids].flatten(1)


# ---------------------------------------------------------------------------------------------------------
# 6. MAE
#
# the paper                        here                                         shape
# visible, masked patches          ids_visible, ids_masked                      [B, n_visible], [B, n_masked]
# masking ratio, 75%               mask_ratio
# latent representation            latents, the class token's first             [B, 1 + n_visible, D]
# mask token                       mask_token                                   [1, 1, decoder_dim]
# normalized pixel values          target in `pixel_loss`, with norm_pix        [B, n_masked, p*p*C]


class MAE(nn.Module):
    """He, Chen, Xie, Li, Dollar, Girshick, "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022,
    arXiv:2111.06377.

    New: the encoder sees only the few visible patches, so that masking three quarters makes it fast. A small
    decoder takes their latents and mask tokens, and predicts the pixels.

    mask_ratio: share of the patches that is masked
    decoder_dim: width of the decoder
    decoder_depth: number of the decoder's blocks
    decoder_heads: attention heads of a decoder block
    norm_pix: predict each patch with mean 0 and variance 1, instead of raw pixels

    Departs from the authors' code, with the same result. The decoder takes [class, visible, masked] in this
    order and does not sort the patches back: each has its position added, and a transformer does not depend
    on the order of its tokens. Only masked patches go through the last layer. So the two sets may be any that
    are disjoint, and patches in neither (AMT's thrown ones) cost nothing. Decoder parameters have the
    release's names.
    """

    inputs = ()
    encoder_options = {}

    def __init__(
        self,
        encoder: ViT,
        mask_ratio: float = 0.75,  # §4, Figure 5
        decoder_dim: int = 512,  # Table 1b
        decoder_depth: int = 8,  # Table 1a
        decoder_heads: int = 16,  # the authors' code
        norm_pix: bool = True,  # Table 1d
    ):
        super().__init__()
        count_masked(encoder.num_patches, mask_ratio, round_up=True)
        check_transformer(decoder_dim, decoder_heads, decoder_depth,
                          ("decoder_dim", "decoder_heads", "decoder_depth"))
        self.encoder, self.mask_ratio, self.norm_pix = encoder, mask_ratio, norm_pix
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = learned_token(decoder_dim)
        self.decoder_pos_embed = nn.Parameter(
            sincos_position_embedding(decoder_dim, encoder.grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = layer_norm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, encoder.patch_dim)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(init_weights)

    def decode(self, latents, ids_visible, ids_masked, keep=None):
        """Latents [B, 1 + n_visible, D] -> predicted patches [B, n_masked, p*p*C]; keep: see `Attention`."""
        x = self.decoder_embed(latents)
        x = torch.cat([x, self.mask_token.to(x.dtype).expand(len(x), ids_masked.shape[1], -1)], dim=1)
        # Positions: row 0 is the class token's.
        positions = F.pad(torch.cat([ids_visible, ids_masked], dim=1) + 1, (1, 0))
        x = x + F.embedding(positions, self.decoder_pos_embed[0])
        for block in self.decoder_blocks:
            x = block(x, keep=keep)
        return self.decoder_pred(self.decoder_norm(x[:, latents.shape[1] :]))

    def predict(self, images, latents, ids_visible, ids_masked, keep=None, keep_masked=None):
        """Latents [B, 1 + n_visible, D] -> the loss on the masked patches of the images, and pred.

        keep: see `decode`. keep_masked: [B, n_masked] bool, the masked patches that count; None for all.
        """
        pred = self.decode(latents, ids_visible, ids_masked, keep)
        target = take(patchify(images, self.encoder.patch_size), ids_masked)
        return pixel_loss(pred, target, self.norm_pix, keep=keep_masked), pred

    def forward(self, images, ids_visible=None, ids_masked=None):
        """images [B, C, H, W], and optionally the mask to use -> loss, pred, ids_visible, ids_masked."""
        if no_mask(ids_visible, ids_masked):
            ids_visible, ids_masked = random_masking(
                len(images), self.encoder.num_patches, self.mask_ratio, images.device)
        latents = self.encoder(images, ids_visible)
        loss, pred = self.predict(images, latents, ids_visible, ids_masked)
        return dict(loss=loss, pred=pred, ids_visible=ids_visible, ids_masked=ids_masked)


# ---------------------------------------------------------------------------------------------------------
# 7. SimMIM
#
# the paper (§3)                   here                                         shape
# masked patch size, 32            unit_size patches of patch_size pixels
# x_M, true values                 target                                       [B, n_masked, p*p*C]
# y_M, predicted values            pred                                         [B, n_masked, p*p*C]
# ||y_M - x_M||_1 / Omega(x_M)     `pixel_loss` with F.l1_loss


def unit_masking(batch, grid, unit_size, mask_ratio, device=None, generator=None):
    """Uniform masking of ceil(units * mask_ratio) units of u*u patches (SimMIM, §3.2).

    Returns ids_visible, ids_masked: indices [B, n*u*u] of patches on the (gh, gw) grid.

    >>> ids_visible, ids_masked = unit_masking(batch=1, grid=(2, 4), unit_size=2, mask_ratio=0.5)
    >>> sorted([ids_visible[0].tolist(), ids_masked[0].tolist()])  # the left unit and the right one
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    units = math.prod(grid) // unit_size**2
    masked = count_masked(units, mask_ratio, round_up=True)
    order = torch.rand(batch, units, device=device, generator=generator).argsort(1)
    return [units_to_patches(ids, grid, unit_size) for ids in (order[:, masked:], order[:, :masked])]


class SimMIM(nn.Module):
    """Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", CVPR 2022, arXiv:2111.09886.

    New: no decoder at all. The encoder sees every patch, a masked one as a learned token. Masks come in units
    larger than a patch, and one linear layer predicts raw pixels under an l1 loss.

    mask_ratio: share of the units that is masked
    unit_size: side of a masking unit in patches; 2 is the paper's 32 pixels at patch size 16

    The encoder of the released ViT-B run has drop path 0.1 and layer scale 0.1, and smaller output
    projections at first (`rescale_projections`), and so here. Departs from that run in three ways: positions
    are the sine-cosine table (there learned relative ones, which the blocks share); the rate falls along a
    cosine (there to a tenth at epoch 700); and the class token has weight decay (there none).
    """

    inputs = ()
    encoder_options = dict(drop_path=0.1, layer_scale=0.1)
    norm_pix = False

    def __init__(
        self,
        encoder: ViT,
        mask_ratio: float = 0.6,  # §4.1
        unit_size: int = 2,  # §4.1
    ):
        super().__init__()
        if unit_size < 1 or any(g % unit_size for g in encoder.grid):
            raise ValueError(f"unit_size={unit_size} must divide both sides of the grid, {encoder.grid}")
        count_masked(encoder.num_patches // unit_size**2, mask_ratio, round_up=True)
        self.encoder, self.mask_ratio, self.unit_size = encoder, mask_ratio, unit_size
        self.mask_token = learned_token(encoder.embed_dim)
        self.head = nn.Linear(encoder.embed_dim, encoder.patch_dim).apply(init_weights)

    def forward(self, images, ids_visible=None, ids_masked=None):
        """images [B, C, H, W], and optionally the mask to use -> loss, pred, ids_visible, ids_masked.

        Patches in neither index tensor (AMT's thrown ones) do not enter the encoder.
        """
        if no_mask(ids_visible, ids_masked):
            ids_visible, ids_masked = unit_masking(
                len(images), self.encoder.grid, self.unit_size, self.mask_ratio, images.device)
        tokens = put(self.encoder.embed(images), ids_masked, self.mask_token)
        latents = self.encoder.encode(tokens, torch.cat([ids_visible, ids_masked], dim=1))
        pred = self.head(latents[:, 1 + ids_visible.shape[1] :])
        target = take(patchify(images, self.encoder.patch_size), ids_masked)
        loss = pixel_loss(pred, target, distance=F.l1_loss)
        return dict(loss=loss, pred=pred, ids_visible=ids_visible, ids_masked=ids_masked)


# ---------------------------------------------------------------------------------------------------------
# 8. Block-wise masking, for BEiT and CAE
#
# BEiT, Alg. 1                     here                                         shape
# h x w                            grid
# M                                ids_masked                                   [B, num_masked]
# s, block size                    area, at least min_block = 16                [B]
# r, aspect ratio                  aspect, in (min_aspect, 1 / min_aspect)      [B]
# a, b, the block's sides          height, width                                [B]
# t, l, its place                  top, left                                    [B], in 0..1


def random_blocks(area, grid, min_aspect, generator=None):
    """One block of about `area` [B] patches per image, at a uniform place: [B, gh, gw] float, ones inside.

    height / width is log-uniform in (min_aspect, 1 / min_aspect). A block that does not fit into the grid has
    no ones.

    >>> random_blocks(torch.tensor([4.0]), grid=(2, 2), min_aspect=1.0).tolist()  # a square of four patches
    [[[1.0, 1.0], [1.0, 1.0]]]
    """
    (gh, gw), device = grid, area.device
    aspect, top, left = torch.rand(3, len(area), device=device, generator=generator)
    aspect = ((2 * aspect - 1) * math.log(min_aspect)).exp()
    height, width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    height = height * ((height <= gh) & (width <= gw))

    def inside(size, extent, place):  # [B, size] float: ones from a uniform start on, `extent` of them
        offset = torch.arange(size, device=device) - (place * (size - extent + 1)).floor()[:, None]
        return ((offset >= 0) & (offset < extent[:, None])).float()

    return inside(gh, height, top)[:, :, None] * inside(gw, width, left)[:, None, :]


def block_masking(batch, grid, num_masked, min_block=16, min_aspect=0.3, device=None, generator=None):
    """Block-wise masking of exactly num_masked patches per image (BEiT, arXiv:2106.08254, Alg. 1).

    A block's area is uniform between min_block and what remains to be masked. Blocks may overlap. Of 30
    proposals per image those are placed that mask no more patches than remain. The patches that are missing
    then (about 0.3 per image in a grid of 24x24) are drawn at random, next to blocks first. A block may be as
    high or as wide as the grid, which BEiT's code excludes. Returns ids_visible [B, N - num_masked] and
    ids_masked [B, num_masked].

    >>> _, ids_masked = block_masking(1, grid=(2, 5), num_masked=4, min_block=4, min_aspect=1.0)
    >>> (ids_masked - ids_masked.min()).sort().values.tolist()  # a square of 2x2 patches, somewhere
    [[0, 1, 5, 6]]
    """
    check_range(1, math.prod(grid) - 1, num_masked=num_masked)
    min_block = min(min_block, num_masked)
    visible = torch.ones(batch, *grid, device=device)
    remaining = torch.full((batch,), float(num_masked), device=device)
    for _ in range(30):  # a fixed number: to ask whether all are done would wait for the GPU
        area = min_block + torch.rand(batch, device=device, generator=generator) * (remaining - min_block)
        new = random_blocks(area, grid, min_aspect, generator) * visible
        added = new.sum((1, 2))
        placed = added <= remaining
        visible -= new * placed[:, None, None]
        remaining -= added * placed
    beside = F.max_pool2d(1 - visible, 3, stride=1, padding=1)
    noise = torch.rand(visible.shape, device=device, generator=generator)
    order = (2 * visible - beside + noise).flatten(1).argsort(1)
    return order[:, num_masked:], order[:, :num_masked]


# ---------------------------------------------------------------------------------------------------------
# 9. BEiT
#
# the paper (§2)                   here                                         shape
# z, visual tokens                 tokens                                       [B, N], in 0..V-1
# |V|, vocabulary                  vocab_size
# M, masked positions              ids_masked                                   [B, n_masked]
# e_[M], mask embedding            mask_token                                   [1, 1, D]
# x^M, corrupted patches           x in forward                                 [B, N, D]
# h_i^L, last hidden vectors       what encoder.encode returns                  [B, 1 + N, D]
# W_c, b_c                         head.weight, head.bias                       [V, D], [V]


class BEiT(nn.Module):
    """Bao, Dong, Piao, Wei, "BEiT: BERT Pre-Training of Image Transformers", ICLR 2022, arXiv:2106.08254.

    New: what is predicted is not a patch's pixels but the discrete token that a tokenizer gives to it. As in
    BERT, the encoder sees every patch, a masked one as a learned token, and one linear layer classifies.
    Masks come in blocks.

    vocab_size: number of the tokenizer's tokens
    mask_ratio: share of the patches that is masked
    min_block: smallest block of masked patches

    The paper's encoder has layer scale 0.1 (ViT-L: 1e-5). Departs from it in the position embedding, here the
    sine-cosine table, and in the augmentation, which has no colour jitter here, as in CAE's own pre-training.
    """

    inputs = ()
    encoder_options = dict(drop_path=0.1, layer_scale=0.1)

    def __init__(
        self,
        encoder: ViT,
        vocab_size,  # the tokenizer's; not annotated, as it is no flag
        mask_ratio: float = 75 / 196,  # §2.5: 75 of 196
        min_block: int = 16,  # §2.3, Alg. 1
    ):
        super().__init__()
        if vocab_size is None:
            raise ValueError("BEiT predicts tokens and needs the vocab_size of a tokenizer")
        check_range(1, min_block=min_block)
        self.encoder, self.vocab_size = encoder, vocab_size
        self.num_masked, self.min_block = count_masked(encoder.num_patches, mask_ratio), min_block
        self.mask_token = learned_token(encoder.embed_dim)
        self.head = TargetHead(encoder, vocab_size)

    def forward(self, images, tokens, ids_visible=None, ids_masked=None):
        """images [B, C, H, W], and optionally the mask to use -> loss, loss_token, accuracy, pred,
        ids_visible, ids_masked.

        tokens: [B, N] int64, of all patches.
        """
        if no_mask(ids_visible, ids_masked):
            ids_visible, ids_masked = block_masking(
                len(images), self.encoder.grid, self.num_masked, self.min_block, device=images.device)
        x = put(self.encoder.embed(images), ids_masked, self.mask_token)
        pred = self.head(take(self.encoder.encode(x)[:, 1:], ids_masked))
        loss, parts = self.head.loss(pred, images, tokens, ids_masked)
        return dict(loss=loss, **parts, pred=pred, ids_visible=ids_visible, ids_masked=ids_masked)


# ---------------------------------------------------------------------------------------------------------
# 10. CAE
#
# the paper (§3)                   here                                         shape
# X_v, X_m                         ids_visible, ids_masked                      [B, n_visible], [B, n_masked]
# F, encoder                       encoder
# H, latent contextual regressor   regress
# G, decoder                       decode
# Z_v                              latents in `regress`                         [B, n_visible, D]
# Q_m, mask queries                queries, at first mask_token                 [B, n_masked, D]
# P_v, positional embeddings       positions(ids_visible)                       [B, n_visible, D]
# Z_m, predicted                   predicted                                    [B, n_masked, D]
# bar Z_m, by the encoder          encoded                                      [B, n_masked, D]
# Y_m                              pred                                         [B, n_masked, V or p*p*C]
# bar Y_m                          tokens, or the masked patches                [B, N], of all patches
# l_y, l_z, lambda                 loss_token or loss_pixel, loss_align, alignment_weight
# sg                               torch.no_grad()


class RegressorBlock(Block):
    """Block of CAE's latent contextual regressor (§3.1): queries [B, m, D], context [B, n, D] -> queries.

    Positions [B, m, D] and [B, n, D] are added to queries and keys, not to values. As in the authors' code,
    the sum after the attention is normed, and the MLP's residual starts from the normed value.
    """

    def __init__(self, dim, num_heads, layer_scale=None):
        super().__init__(dim, num_heads, layer_scale=layer_scale)
        self.norm1, self.attn = nn.Identity(), CrossAttention(dim, num_heads)  # which has norms of its own

    def forward(self, queries, context, query_positions, context_positions):
        attended = self.attn(queries + query_positions, context + context_positions, context)
        x = self.norm2(queries + self.drop_path(self.ls1(attended)))
        return x + self.drop_path(self.ls2(self.mlp(x)))


class CAE(nn.Module):
    """Context autoencoder. Chen et al., "Context Autoencoder for Self-Supervised Representation Learning",
    IJCV 2023, arXiv:2202.03026.

    New: predicting and encoding are kept apart. A regressor predicts the masked patches' latents from the
    visible ones, and an alignment loss keeps them in the encoder's own space. The decoder sees nothing but
    the predicted latents. So the encoder learns all of the representation, and the decoder can read the
    encoder's latents of a whole image.

    vocab_size: number of the tokenizer's tokens; None predicts pixels, the variant of Table 9
    mask_ratio: share of the patches that is masked
    min_block: smallest block of masked patches
    regressor_depth: blocks of the latent contextual regressor
    decoder_depth: blocks of the decoder; 0 is a linear layer alone, without norm and positions (Table 2)
    alignment_weight: lambda of Eq. 1
    norm_pix: predict each patch with mean 0 and variance 1, as MAE (not with a tokenizer)

    The paper's encoder has drop path 0.1, and in the authors' code layer scale 0.1 (ViT-L: 1e-5). Regressor
    and decoder take both; see `rescale_projections`. As in that code, the encoder has a class token, which
    goes no further, and the latents that are aligned are those after its last norm. The authors keep a second
    encoder with the same weights for the targets; here one encoder does both. Table 9 has the "RGB pixel
    value" as a target; that each patch is normalised is ours. Their code draws the first weights of the patch
    projection and of the tokens from a normal distribution of deviation 0.02 that is cut off at 0.02, which
    leaves a deviation of 0.0108; here they are drawn as MAE's. Sections, tables and figures are numbered as
    in the version under review.
    """

    inputs = ()
    encoder_options = dict(drop_path=0.1, layer_scale=0.1)  # Appendix A, and the authors' code

    def __init__(
        self,
        encoder: ViT,
        vocab_size=None,  # the tokenizer's; not annotated, as it is no flag
        mask_ratio: float = 0.5,  # §3.2: 98 of 196
        min_block: int = 16,  # as BEiT
        regressor_depth: int = 4,  # Table 6
        decoder_depth: int = 4,  # Table 6
        alignment_weight: float = 2.0,  # Appendix A
        norm_pix: bool = True,  # ours
    ):
        super().__init__()
        if encoder.relative_position:
            raise ValueError("CAE needs an encoder with a position table, not one with relative positions")
        check_range(1, min_block=min_block, regressor_depth=regressor_depth)
        check_range(0, decoder_depth=decoder_depth, alignment_weight=alignment_weight)
        self.encoder, self.vocab_size, self.norm_pix = encoder, vocab_size, norm_pix
        self.alignment_weight = alignment_weight
        self.num_masked, self.min_block = count_masked(encoder.num_patches, mask_ratio), min_block
        D, heads, scale = encoder.embed_dim, encoder.num_heads, encoder.layer_scale
        self.mask_token = learned_token(D)
        self.regressor_blocks = nn.ModuleList(RegressorBlock(D, heads, scale) for _ in range(regressor_depth))
        self.regressor_norm = layer_norm(D)
        self.decoder_blocks = nn.ModuleList(Block(D, heads, layer_scale=scale) for _ in range(decoder_depth))
        self.decoder_norm = layer_norm(D) if decoder_depth else nn.Identity()
        self.head = TargetHead(encoder, vocab_size, norm_pix)
        for blocks in (self.regressor_blocks, self.decoder_blocks):
            set_drop_path(blocks, encoder.drop_path)
            blocks.apply(init_weights)
            rescale_projections(blocks)

    def positions(self, ids):
        """The position embeddings [B, n, D] of the patches `ids`."""
        return F.embedding(ids, self.encoder.pos_embed[0, 1:])

    def regress(self, latents, ids_visible, ids_masked):
        """H: latents Z_v [B, n_visible, D] of the visible patches -> Z_m [B, n_masked, D], predicted."""
        positions = self.positions(ids_masked)
        context_positions = torch.cat([self.positions(ids_visible), positions], dim=1)
        queries = self.mask_token.expand(len(latents), ids_masked.shape[1], -1)
        for block in self.regressor_blocks:
            context = torch.cat([latents, queries], dim=1)  # Z_v never changes, the queries do
            queries = block(queries, context, positions, context_positions)
        return self.regressor_norm(queries)

    def decode(self, latents, ids):
        """G: latents [B, n, D] of the patches `ids`, predicted or encoded -> pred [B, n, V or p*p*C]."""
        x = latents + self.positions(ids) if self.decoder_blocks else latents
        for block in self.decoder_blocks:
            x = block(x)
        return self.head(self.decoder_norm(x))

    def predict_whole(self, images):
        """Whole images -> pred [B, N, V or p*p*C] by encoder and decoder, without the regressor (Figures 3,
        10)."""
        ids = torch.arange(self.encoder.num_patches, device=images.device).expand(len(images), -1)
        return self.decode(self.encoder.encode(self.encoder.embed(images))[:, 1:], ids)

    def forward(self, images, tokens=None, ids_visible=None, ids_masked=None):
        """images [B, C, H, W], and optionally the mask to use -> loss (Eq. 1) and its parts loss_align and
        loss_pixel (or loss_token, and accuracy); pred, ids_visible, ids_masked.

        tokens: [B, N] of all patches, where it was built with vocab_size.
        """
        if no_mask(ids_visible, ids_masked):
            ids_visible, ids_masked = block_masking(
                len(images), self.encoder.grid, self.num_masked, self.min_block, device=images.device)
        embedded = self.encoder.embed(images)
        latents = self.encoder.encode(embedded, ids_visible)[:, 1:]
        predicted = self.regress(latents, ids_visible, ids_masked)
        # Stop-gradient of Eq. 1. This pass comes second: autocast caches weight copies, and copies made under
        # no_grad would cut the other pass's gradients.
        with torch.no_grad():
            encoded = self.encoder.encode(embedded, ids_masked)[:, 1:]
        pred = self.decode(predicted, ids_masked)
        loss, parts = self.head.loss(pred, images, tokens, ids_masked)
        loss_align = F.mse_loss(predicted.float(), encoded.float())
        return dict(loss=loss + self.alignment_weight * loss_align, loss_align=loss_align, **parts,  # Eq. 1
                    pred=pred, ids_visible=ids_visible, ids_masked=ids_masked)


# ---------------------------------------------------------------------------------------------------------
# 11. AMT
#
# the paper                        here                                         shape
# x_p, E, E_pos, z (Eq. 1)         `ViT.embed`, `ViT.sequence`                  [B, 1 + N, D]
# L (Eq. 2)                        `pixel_loss`, by the base
# A_i, N_h, D_h (Eq. 3)            `Attention.weights`; num_heads, D / num_heads
# a_i^1 (Eq. 4)                    last_attention(images)                       [B, heads, N]
# a_w, masking weights (Eq. 4)     `attention_map`, kept in maps                [B, gh, gw]
# Normalize (Alg. 1)               in `attention_map`, of each head
# P_A (Eq. 5)                      `patch_weights`                              [B, N] or units of patches
# S, M (Eq. 5)                     order in `attention_masking`                 [B, N]
# r, t; mask_c, throw_c (Alg. 1)   mask_ratio, throw_ratio; num_masked, num_thrown
# C, z_I (Eq. 6)                   ids_visible and ids_masked; not ids_thrown

Throw = Literal["middle", "low", "random"]


@torch.no_grad()
def attention_map(encoder, images):
    """Whole images [B, C, H, W] -> masking weights a_w [B, gh, gw] in [0, 1] (AMT, Eq. 3, 4).

    The encoder works without drop path. Departs from the paper as the authors' code does: every head is
    scaled to [0, 1] before the mean of heads, where §3.2 scales the mean once.
    """
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    attention = encoder.last_attention(images)  # Eq. 3, the class token's row: [B, heads, N]
    torch.clear_autocast_cache()  # older torch would use the weights that were cast here, without gradients
    for module, training in modes:
        module.training = training
    low, high = attention.aminmax(dim=-1, keepdim=True)
    attention = (attention - low) / (high - low).clamp_min(1e-12)
    return attention.mean(1).unflatten(1, encoder.grid)  # Eq. 4


def attention_masking(weights, num_masked, num_thrown, throw="middle", generator=None):
    """Attention-driven masking and throwing (AMT, Eq. 5, 6 and Alg. 1).

    weights: P_A [B, N], not negative. M orders the patches; the larger the weight, the likelier an early
    place in M. The first num_masked of M are masked, then num_thrown are thrown, the rest is visible
    (throw="middle", the paper's choice). Table 4 has two others: "low" throws the end of M; "random" makes M
    without the weights ("MAE+Random T"). Returns ids_visible, ids_masked, ids_thrown, together all patches.

    >>> weights = torch.tensor([[1.0, 1e30, 1e10, 1e20]])  # so different that M is 1, 3, 2, 0
    >>> [ids.tolist() for ids in attention_masking(weights, num_masked=1, num_thrown=2)]
    [[[0]], [[1]], [[3, 2]]]
    >>> [ids.tolist() for ids in attention_masking(weights, num_masked=1, num_thrown=2, throw="low")]
    [[[3]], [[1]], [[2, 0]]]
    """
    check_choice("throw", throw, Throw)
    check_range(0, weights.shape[1], num_thrown=num_thrown)
    check_range(0, weights.shape[1] - num_thrown, num_masked=num_masked)
    if throw == "random":
        weights = torch.ones_like(weights)
    # Eq. 5, M = S(P_A): all N patches are drawn by weight, without replacement. Sorting E_i / w_i with E_i
    # exponential is the same distribution, as the smallest of independent Exp(w_i) is number i with chance
    # w_i / sum w. torch.multinomial would refuse weights of zero; here the floor of 1e-12 puts them last.
    noise = torch.empty_like(weights, dtype=torch.float32).exponential_(generator=generator)
    order = (noise / weights.float().clamp_min(1e-12)).argsort(1)
    ids_masked, rest = order[:, :num_masked], order[:, num_masked:]  # Eq. 6
    if throw == "low":
        rest = rest.roll(num_thrown, 1)  # the end of M comes first
    return rest[:, num_thrown:], ids_masked, rest[:, :num_thrown]


def crop_maps(maps, box, flip, size):
    """Cuts and flips maps of whole images as the images were cut and flipped: [B, gh, gw] -> [B, *size].

    box: [B, 4] crop boxes (x1, y1, x2, y2) as fractions of the whole image; flip: [B] bool, horizontal.

    §3.2 interpolates the map to the size of the image, crops both, and sums the map over each patch.
    roi_align does these steps at once, with one box for each image: each output cell is the mean of 4 x 4
    bilinear samples of the map. The mean in place of the sum is one factor for all patches, which changes no
    draw.

    >>> maps = torch.arange(4.0).expand(2, 4, 4)  # a cell's value is its column
    >>> middle, flip = torch.tensor([[0.25, 0.25, 0.75, 0.75]]).expand(2, -1), torch.tensor([False, True])
    >>> crop_maps(maps, middle, flip, size=(1, 2)).tolist()
    [[[1.0, 2.0]], [[2.0, 1.0]]]
    """
    if not len(maps) == len(box) == len(flip):
        raise ValueError("maps, box and flip must be of as many images, got "
                         f"{len(maps)}, {len(box)} and {len(flip)}")
    gh, gw = maps.shape[1:]
    x1, y1, x2, y2 = box.to(maps.device, torch.float32).unbind(1)
    number = torch.arange(len(box), device=maps.device)
    rois = torch.stack([number, x1 * gw, y1 * gh, x2 * gw, y2 * gh], dim=1)
    crops = roi_align(maps.float().unsqueeze(1), rois, size, sampling_ratio=4, aligned=True).squeeze(1)
    return torch.where(flip.to(maps.device)[:, None, None], crops.flip(-1), crops)


class AMT(nn.Module):
    """Attention-driven masking and throwing. Liu, Gui, Luo, "Good helper is around you: Attention-driven
    Masked Image Modeling", AAAI 2023, arXiv:2211.15362.

    New: the model's own class attention says where the object is. Highly attended patches are more likely to
    be masked, and a middle part of the order is thrown: it enters neither encoder nor decoder nor loss.

    AMT is a masking strategy around a method, as in `AMT(MAE(encoder))`; the method does the rest. Any base
    will do if it has forward(images, ids_visible, ids_masked) -> dict for any patches, `mask_ratio` and
    `encoder`, and, where it masks units of patches, `unit_size`.

    mask_ratio: share of the patches that is masked after the first interval; None is 0.45 on MAE, 0.44 on
        SimMIM, and with throw_ratio=0 the base's own, for attention-driven masking alone (Table 1)
    throw_ratio: share of the patches that is thrown after the first interval; None is 0.40 on MAE, 0.26 on
        SimMIM
    throw: which part of the order is thrown (Table 4): middle, as in the paper; low, its end; random masks
        and throws without regard to the maps
    interval: epochs between updates of the maps; None is 10% of the run's epochs on MAE, 20% on SimMIM, at
        least 4, as an update costs up to an epoch's time, and at most the paper's 40

    forward(images, index, box, flip) draws random masks (the base's own) until `update_maps` has filled
    `maps`, one map of the whole image for each training image, and then cuts from them what the augmentation
    cut from the images. forward(images) computes maps on the spot, which costs one more pass of the encoder.
    Departs from the authors' code, and follows the paper, in three ways. The code crops its maps at a wrong
    place (always near one corner, by 2x2 to 3x3 cells, whatever the image's crop), so the published figures
    come from other masks than the paper's. It renews the maps one epoch later. On MAE it throws int(0.85 N) -
    int(0.45 N) patches, here int(0.40 N); the two agree at the paper's N = 196. See also `attention_map`.
    The released runs differ besides: the targets are raw pixels (the paper does not say which); on SimMIM the
    ratio is 0.44 in the random phase, too, positions are learned, and the rate ends at 5e-6 per 512 images.
    The command in their README sets neither ratio.
    The nine updates in 400 epochs are 1.9% of the run's operations (the paper says about 1%), because the map
    of an image, a pass of the encoder over all patches, is nearly as much as a training step of AMT.
    """

    inputs = ("index", "box", "flip")
    encoder_options = {}  # those of the base

    def __init__(
        self,
        base,
        mask_ratio: float | None = None,  # §4.1
        throw_ratio: float | None = None,  # §4.1
        throw: Throw = "middle",  # Eq. 6, Alg. 1
        interval: int | None = None,  # §4.1
    ):
        super().__init__()
        check_choice("throw", throw, Throw)
        has_units = hasattr(base, "unit_size")
        # §4.1: r, t and the interval as a share of the epochs, on SimMIM and on MAE.
        own_ratio, own_throw, self.interval_share = (0.44, 0.26, 0.2) if has_units else (0.45, 0.40, 0.1)
        if throw_ratio is None:
            throw_ratio = own_throw
        if mask_ratio is None:  # r belongs to t: where nothing is thrown, as much is masked as by the base
            mask_ratio = base.mask_ratio if throw_ratio == 0 else own_ratio
        if interval is not None:
            check_range(1, interval=interval)
        check_range(0, 1, throw_ratio=throw_ratio)
        self.mask_ratio, self.throw_ratio = mask_ratio, throw_ratio
        self.base, self.throw, self.interval = base, throw, interval
        self.norm_pix = getattr(base, "norm_pix", False)
        self.unit_size = getattr(base, "unit_size", 1)
        self.unit_grid = tuple(g // self.unit_size for g in base.encoder.grid)
        units = math.prod(self.unit_grid)
        # Alg. 1's N * r and N * t. SimMIM rounds numbers of units up; on MAE the authors' code rounds down.
        self.num_masked = count_masked(units, mask_ratio, has_units)
        self.num_thrown = count_share(units, throw_ratio, has_units)
        if self.num_masked + self.num_thrown >= units:
            raise ValueError(f"mask_ratio={mask_ratio} and throw_ratio={throw_ratio} leave nothing "
                             f"visible: {self.num_masked} masked and {self.num_thrown} thrown of {units}")
        self.register_buffer("maps", None, persistent=False)  # float16 [images, gh, gw], once there are any

    @property
    def encoder(self):
        return self.base.encoder

    def interval_for(self, epochs):
        """The epochs between two updates of the maps in a run of `epochs` epochs."""
        return self.interval or min(40, max(4, round(self.interval_share * epochs)))  # §4.1

    def maps_due(self, epoch, epochs):
        """True if the maps are to be computed before this epoch (from 0 on): after every interval."""
        return epoch > 0 and epoch % self.interval_for(epochs) == 0

    @torch.no_grad()
    def update_maps(self, batches, num_images):
        """Computes the maps of all `num_images` images, from batches (whole images [B, C, H, W], index [B]).

        Under torch.distributed each process brings a part of the images, and each gets all maps.
        """
        weight = next(self.parameters())  # it says on which device
        maps = weight.new_zeros(num_images, *self.encoder.grid, dtype=torch.float16)
        if self.throw == "random":  # its draws ignore the maps, so no image is read
            batches, maps = (), maps + 1
        for images, index in batches:
            maps[index] = attention_map(self.encoder, images).half()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(maps, op=dist.ReduceOp.MAX)  # what a process did not compute is zero there
        self.maps = maps

    def patch_weights(self, images, index, box, flip):
        """P_A of Eq. 5, a weight for each unit: [B, gh, gw] of unit_grid; None while there are no maps."""
        if index is None:
            maps, flip = attention_map(self.encoder, images), torch.zeros(len(images), dtype=torch.bool)
            box = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(images), -1)
        elif self.maps is None:
            return None
        else:
            maps = self.maps[index]
        return crop_maps(maps, box, flip, self.unit_grid)

    def draw(self, weights):
        """P_A [B, gh, gw] of the units -> ids_visible, ids_masked, ids_thrown of patches (Eq. 5, 6)."""
        ids = attention_masking(weights.flatten(1), self.num_masked, self.num_thrown, self.throw)
        return [units_to_patches(i, self.encoder.grid, self.unit_size) for i in ids]

    def forward(self, images, index=None, box=None, flip=None, ids_visible=None, ids_masked=None):
        """images [B, C, H, W] -> the base's loss, pred, ids_visible, ids_masked, and ids_thrown.

        index: [B], each image's number among the training images; with it box [B, 4] and flip [B] must be
            given, see `crop_maps`. None: maps are computed on the spot.
        ids_visible, ids_masked: the mask to use. With it, and with the base's random masks, ids_thrown is
            empty.
        """
        if index is not None and (box is None or flip is None):
            raise ValueError("index needs box and flip, to cut the maps as the images were cut")
        ids_thrown = images.new_zeros(len(images), 0, dtype=torch.int64)
        if no_mask(ids_visible, ids_masked):
            weights = self.patch_weights(images, index, box, flip)
            if weights is not None:
                ids_visible, ids_masked, ids_thrown = self.draw(weights)
        out = self.base(images, ids_visible=ids_visible, ids_masked=ids_masked)  # draws a mask if given None
        return dict(out, ids_thrown=ids_thrown)


# ---------------------------------------------------------------------------------------------------------
# 12. LoMaR
#
# the paper (§3)                   here                                         shape
# h x w patches                    grid
# K x K patches of a window, m     window_size
# n windows, "views" of Table 4    num_windows, W below
# r_ij                             relative_table[buckets[i, j]]                [D / heads]
# visible, masked ("zero out")     ids_visible, ids_masked                      [B, W * n_visible or n_masked]
# normalized ground truth          target in `pixel_loss`, with norm_pix        [B, W * n_masked, p*p*C]


def window_places(grid, window_size, num_windows):
    """The numbers of rows and of columns at which a K*K window can begin.

    ValueError if these are fewer places than num_windows.
    """
    check_range(1, min(grid), window_size=window_size)
    rows, columns = (g - window_size + 1 for g in grid)
    check_range(1, rows * columns, num_windows=num_windows)
    return rows, columns


def window_masking(batch, grid, window_size, num_windows, mask_ratio, device=None, generator=None):
    """Windows of K*K patches at different places, int(K*K * mask_ratio) masked in each (LoMaR, §3.2).

    Returns ids_visible [B, W * n_visible], ids_masked [B, W * n_masked], window after window; windows may
    overlap.

    >>> ids_visible, ids_masked = window_masking(1, (2, 3), window_size=2, num_windows=2, mask_ratio=0.5)
    >>> windows = torch.cat([ids_visible.view(2, -1), ids_masked.view(2, -1)], dim=1)
    >>> sorted(windows.sort().values.tolist())  # there are two places for 2x2 patches in 2x3
    [[0, 1, 3, 4], [1, 2, 4, 5]]
    """
    K, (rows, columns) = window_size, window_places(grid, window_size, num_windows)
    masked = count_masked(K * K, mask_ratio)
    noise = torch.rand(batch, rows * columns, device=device, generator=generator)
    place = noise.argsort(1)[:, :num_windows, None]
    row, column = place // columns, place % columns
    order = torch.rand(batch, num_windows, K * K, device=device, generator=generator).argsort(2)
    ids = (row + order // K) * grid[1] + column + order % K
    return ids[..., masked:].flatten(1), ids[..., :masked].flatten(1)


class LoMaR(nn.Module):
    """Local masked reconstruction. Chen, Hu, Li, Elhoseiny, "Efficient Self-supervised Vision Pretraining
    with Local Masked Reconstruction", 2022, arXiv:2206.00790.

    New: an image is reconstructed inside a few small windows. Each window is a sequence of its own, so nearly
    all of the cost follows the windows, not the image: O(hw + n m^4) (§3.2). One encoder sees visible and
    masked patches, and relative positions make all places alike.

    encoder: a ViT with relative_position=True
    vocab_size: predict tokens of such a vocabulary instead of pixels: LoMaR on BEiT (§4.2; there with BEiT's
        settings, for 300 epochs); None is pixels
    mask_ratio: share of each window's patches that is masked
    window_size: side of a window, in patches
    num_windows: windows per image; None is min(N, 196) / K^2, rounded up, as in Table 4: 8 of 5x5, 4 of 7x7,
        3 of 9x9; and §4.1's 6 and 9 of 7x7 for images of 384 (§6.2: 9) and 448 pixels
    norm_pix: see `MAE` (not with a tokenizer)

    Departs from the authors' code, and follows the paper: each image has windows at different places of its
    own. That code draws W places for the whole batch, and then confuses two orders: its images are laid out
    window by window, its windows image by image. Where W divides the batch, as in its README, each image
    therefore gets one of the places W times, with W masks, which no loss shows. It sees 49 of 196 patches per
    step, here 115 on average: if that code made the published numbers, they come from one window per image.
    "Zero out" (§3.2) is a learned mask token, and the "MLP head" one linear layer, as in that code. The class
    token is that code's, too; the paper does not mention it. Patches attend to it, but no loss reaches its
    output.
    """

    inputs = ()
    encoder_options = dict(relative_position=True)

    def __init__(
        self,
        encoder: ViT,
        vocab_size=None,  # the tokenizer's; not annotated, as it is no flag
        mask_ratio: float = 0.8,  # Figure 6
        window_size: int = 7,  # §4.3, Figure 5
        num_windows: int | None = None,  # Table 4
        norm_pix: bool = True,  # §3.2: "normalized ground-truth image"
    ):
        super().__init__()
        if not encoder.relative_position:
            raise ValueError("LoMaR needs an encoder with relative positions: relative_position=True")
        if num_windows is None:
            num_windows = math.ceil(min(encoder.num_patches, 196) / max(1, window_size) ** 2)  # Table 4
            if (window_size, encoder.patch_size) == (7, 16):  # §4.1
                num_windows = {(384, 384): 6, (448, 448): 9}.get(pair(encoder.image_size), num_windows)
        window_places(encoder.grid, window_size, num_windows)
        self.encoder, self.mask_ratio, self.norm_pix = encoder, mask_ratio, norm_pix
        self.vocab_size, self.window_size, self.num_windows = vocab_size, window_size, num_windows
        self.num_masked = count_masked(window_size**2, mask_ratio)  # of each window
        self.num_visible = window_size**2 - self.num_masked
        self.mask_token = learned_token(encoder.embed_dim)
        self.head = TargetHead(encoder, vocab_size, norm_pix)
        self.register_buffer("buckets", relative_buckets((window_size, window_size)), persistent=False)

    def forward(self, images, tokens=None, ids_visible=None, ids_masked=None):
        """images [B, C, H, W], and optionally the windows to use -> loss, pred, ids_visible, ids_masked.

        tokens: [B, N] of all patches, if it was built with vocab_size; they add loss_token and accuracy.
        The index tensors are as from `window_masking`, one window after the other.
        """
        if no_mask(ids_visible, ids_masked):
            ids_visible, ids_masked = window_masking(
                len(images), self.encoder.grid, self.window_size, self.num_windows, self.mask_ratio,
                images.device)
        ids_visible, ids_masked = (ids.expand(len(images), -1) for ids in (ids_visible, ids_masked))
        # A window is a sequence of its own, [B*W, K*K]. Sorting brings its patches into raster order: then
        # the buckets of one K*K grid hold for every window and every mask.
        visible, masked = ids_visible.reshape(-1, self.num_visible), ids_masked.reshape(-1, self.num_masked)
        ids_window, order = torch.cat([visible, masked], dim=1).sort(1)
        masked = order.argsort(1)[:, self.num_visible :]  # where in the window the masked patches lie
        x = take(self.encoder.embed(images), ids_window.view(len(images), -1))
        x = put(x.reshape(*ids_window.shape, -1), masked, self.mask_token)
        latents = self.encoder.encode(x, buckets=self.buckets)
        pred = self.head(take(latents[:, 1:], masked)).reshape(*ids_masked.shape, -1)
        loss, parts = self.head.loss(pred, images, tokens, ids_masked)
        return dict(loss=loss, **parts, pred=pred, ids_visible=ids_visible, ids_masked=ids_masked)


# ---------------------------------------------------------------------------------------------------------
# 13. Label maps, for ObjMAE and R-MAE
#
# Regions or objects are labels from 1 to 255 in L layers [B, L, H, W]; 0 is none. A region is a pair of layer
# and label; its number is 256 * layer + label. Regions of different layers may overlap.

NUM_LABELS = 256  # of one layer


def check_maps(images, maps):
    """Raises a ValueError unless `maps` are as many and as large as the images [B, C, H, W]."""
    if maps is None or maps.ndim != 4 or (len(maps), *maps.shape[2:]) != (len(images), *images.shape[2:]):
        raise ValueError("needs regions, label maps [B, L, H, W], or region_maps, binary [B, k, H, W], as "
                         f"many and as large as the images, got {maps if maps is None else list(maps.shape)}")


def region_areas(regions):
    """Label maps [B, L, H, W] -> the number of pixels of each region, [B, L * 256] float; 0 for label 0.

    >>> region_areas(torch.tensor([[[[0, 1, 1, 2]]]]))[0, :3].tolist()
    [0.0, 2.0, 1.0]
    """
    labels = regions.long().flatten(2)
    areas = torch.zeros(*labels.shape[:2], NUM_LABELS, device=regions.device, dtype=torch.float32)
    return areas.scatter_add(2, labels, (labels > 0).float()).flatten(1)


def binary_maps(regions, chosen):
    """The binary maps [B, k, H, W] of the regions `chosen` [B, k], which are 256 * layer + label.

    >>> binary_maps(torch.tensor([[[[0, 1, 1, 2]]]]), torch.tensor([[2, 1]])).int().tolist()
    [[[[0, 0, 0, 1]], [[0, 1, 1, 0]]]]
    """
    layer = (chosen // NUM_LABELS)[..., None, None].expand(-1, -1, *regions.shape[2:])
    return regions.gather(1, layer) == (chosen % NUM_LABELS)[..., None, None]


# ---------------------------------------------------------------------------------------------------------
# 14. ObjMAE
#
# the paper (§3, 4.1, App. A)      here                                         shape
# y_p, segmentation                regions                                      [B, L, H, W]
# S(y = i) / S(y) (Eq. 1)          `region_areas` / pixels, >= object_floor     [B, L * 256]
# M_c, w_k^c, f_k (Eq. 2)          maps, head.weight, x in `class_activation_map`
# H * W patches                    encoder.num_patches
# alpha H W                        count
# X_src, source patches            ids_visible, keep_visible                    [B, count]
# X_tar, target patches            ids_masked, keep_masked                      [B, count]
# X_out, discarded patches         all others
#
# The steps of §3: selection (`select_objects`, `object_patches`), division (`divide_patches`), alignment
# (`align_patches`).

Alignment = Literal["throwout", "zero", "replicate", "random"]
Selection = Literal["intra", "inter"]


@torch.no_grad()
def class_activation_map(network, images, labels=None):
    """Class activation maps [B, 1, h, w] in 0..1, as fine as the last features (ObjMAE, Eq. 2). The maximum
    of each is 1, or 0 if all speaks against the class; what does is 0.

    network: a classifier in eval mode whose last two children are a global average pool and a linear layer,
        as of torchvision's ResNets.
    labels: [B], the classes of the maps; None for the predicted ones.
    """
    *features, _, head = network.children()
    x = nn.Sequential(*features)(images)
    if labels is None:
        labels = head(x.mean((2, 3))).argmax(1)
    maps = torch.einsum("bchw,bc->bhw", x, head.weight[labels])[:, None].clamp(min=0)
    return maps / maps.amax((2, 3), keepdim=True).clamp_min(1e-12)


def select_objects(regions, number, floor=0.05, generator=None):
    """Draws different objects uniformly from those that cover `floor` of the image (ObjMAE, §3.2, §4.1).

    regions: [B, L, H, W] integer label maps. Returns binary maps [B, number, H, W], and [B, number] bool,
    False where there are not so many objects.

    >>> maps, found = select_objects(torch.tensor([[[[7, 7, 7, 9]]]]), number=2, floor=0.5)
    >>> maps[0, 0].int().tolist(), found.tolist()  # 7 is large enough, 9 is not
    ([[1, 1, 1, 0]], [[True, False]])
    """
    usable = region_areas(regions) >= max(1, floor * regions[0, 0].numel() - 1e-3)  # Eq. 1
    noise = torch.rand(usable.shape, device=usable.device, generator=generator)
    chosen = (noise + usable).topk(number, dim=1).indices
    return binary_maps(regions, chosen), usable.gather(1, chosen)


def object_patches(maps, patch_size, share=0.2):
    """Binary maps [B, H, W] -> the patches with `share` of their pixels inside, [B, N] bool (ObjMAE, §3.2).

    >>> maps = torch.tensor([[[1, 0, 1, 1], [0, 0, 1, 0]]])  # two patches, with one and with three pixels
    >>> object_patches(maps, patch_size=2, share=0.5).tolist()
    [[False, True]]
    """
    return patchify(maps[:, None].float(), patch_size).sum(-1) >= share * patch_size**2 - 1e-3


def keep_patches(member, count, strength=None, generator=None):
    """Keeps at most `count`, a number or [B, 1], of the patches `member` [B, N] bool -> [B, N] bool.

    strength: [B, N] >= 0, of which the largest are kept; None keeps random patches.

    >>> member, strength = torch.tensor([[1, 1, 0, 1]]).bool(), torch.tensor([[0.1, 0.8, 0.9, 0.2]])
    >>> keep_patches(member, 2, strength).int().tolist()
    [[0, 1, 0, 1]]
    """
    if strength is None:
        strength = torch.rand(member.shape, device=member.device, generator=generator)
    rank = strength.masked_fill(~member, -1).argsort(1, descending=True).argsort(1)
    return member & (rank < count)


def divide_patches(member, count, generator=None):
    """Divides the patches `member` [B, N] bool into two random halves, [B, N] bool each (ObjMAE, §3.3).

    The halves are disjoint, of one size, and have at most `count` patches each. Of an odd number one patch is
    in neither.

    >>> source, target = divide_patches(torch.tensor([[1, 0, 1, 1, 1, 1]]).bool(), count=3)
    >>> source.sum().item(), target.sum().item(), (source | target).sum().item()  # of five
    (2, 2, 4)
    """
    half = (member.sum(1, keepdim=True) // 2).clamp(max=count)
    source = keep_patches(member, half, generator=generator)
    return source, keep_patches(member & ~source, half, generator=generator)


def align_patches(source, target, count, alignment, generator=None):
    """Brings the lists of source and target patches of all images to one length, n (ObjMAE, §3.3).

    source, target: [B, N] bool, disjoint, with 1 to `count` patches per image. Returns ids_visible,
    ids_masked [B, n], and keep_visible, keep_masked: [B, n] bool with "zero" as the alignment, else None. n
    is `count`, with "throwout" at most that. Source 0, 1, 2 and target 5 of eight patches become with
    count=3, for example:

        alignment  ids_visible  ids_masked
        throwout   1            5           cut to the shortest list of the batch
        zero       1 0 2        5 5 5       filled up; keep_masked is True, False, False
        replicate  1 0 2        5 5 5       the same, and every 5 counts
        random     1 0 2        5 7 3       filled up from anywhere, without a patch of the other list

    >>> source, target = torch.arange(8)[None] < 3, torch.arange(8)[None] == 5
    >>> ids_visible, ids_masked, keep_visible, keep_masked = align_patches(source, target, 3, "zero")
    >>> sorted(ids_visible[0].tolist()), ids_masked[0].tolist(), keep_masked[0].tolist()
    ([0, 1, 2], [5, 5, 5], [True, False, False])
    >>> [ids.shape[1] for ids in align_patches(source, target, 3, "throwout")[:2]]
    [1, 1]
    """
    def shuffle(member, last=False):  # all N patches: members, then others, then `last`; each at random
        noise = torch.rand(member.shape, device=member.device, generator=generator)
        return (noise + 2 * ~member + 4 * last).argsort(1)

    source_size, target_size = source.sum(1, keepdim=True), target.sum(1, keepdim=True)
    slot = torch.arange(count, device=source.device)
    if alignment == "throwout":
        count = int(torch.minimum(source_size, target_size).min())  # waits for the device: it is a shape
        return shuffle(source)[:, :count], shuffle(target)[:, :count], None, None
    if alignment == "random":
        ids_visible = shuffle(source, last=target)[:, :count]
        taken = torch.zeros_like(source).scatter(1, ids_visible, True)
        return ids_visible, shuffle(target, last=taken)[:, :count], None, None
    # The patches of a list again and again: 1 2 3 1 2 3 1.
    ids_visible = shuffle(source).gather(1, slot % source_size)
    ids_masked = shuffle(target).gather(1, slot % target_size)
    if alignment == "replicate":
        return ids_visible, ids_masked, None, None
    # "zero": what is repeated is padding, which attention and loss leave out.
    return ids_visible, ids_masked, slot < source_size, slot < target_size


class ObjMAE(MAE):
    """Object-wise masked autoencoder. Wu, Mo, "Object-wise Masked Autoencoders for Fast Pre-training", 2022,
    arXiv:2205.14338.

    New: one object of the image is drawn. Half of its patches are for the encoder (source), half are
    predicted (target). All else of the image enters nothing, which leaves a fraction of the cost and no
    context but the object's own. MAE with mask_ratio=0.5 is the case alpha=0.5 with the whole image as the
    object.

    alpha: length of source and of target, each, as a share of all patches; on COCO half of §4.1's 0.34,
        which is Table 9's 0.17; on CLEVR 0.05 (§4.7)
    alignment: how all images come to this length (§3.3): throwout cuts to the batch's smallest (beyond its
        recompile limit torch.compile runs new lengths eagerly), zero pads with tokens that take part in
        nothing, replicate repeats patches, random adds patches of neither list (the paper: of all)
    selection: intra is source and target from one object; inter is each from another object, or one of them
        from the background (§4.5, Figure 6)
    object_floor: smallest object, as a share of the image; with 1 no object is large enough, and all of each
        image is its object, which is Table 9's MAE with an alpha (not with regions=cam)
    patch_share: share of a patch's pixels that makes it the object's

    No code was released. Of a class activation map the patches above 0.3 (Appendix A) are the object, cut to
    the 2 * alpha * N of strongest response (§4.3); the map is a ResNet-50's, as in §3.2 and the appendix
    (§4.1 says ResNet-34 once). Readings: the class token, which the paper does not mention, stays as in MAE;
    "filled with zero" (§3.3) is padding that takes part in nothing; the paper does not name the alignment of
    its main runs, and "random" is the best of its Table 8; §4.1's 0.34 is source and target together, as
    §4.4 removes 83% of the patches. Departs from the paper: it drops images without a usable object, 12.5%
    of COCO; here all of such an image is the object.
    """

    inputs = ("regions",)

    def __init__(
        self,
        encoder: ViT,
        alpha: float = 0.25,  # Table 4
        alignment: Alignment = "zero",  # ours; the paper does not name its own
        selection: Selection = "intra",  # §3.1
        object_floor: float = 0.05,  # §4.1
        patch_share: float = 0.2,  # §3.2
        decoder_dim: int = 192,  # Table 1
        decoder_depth: int = 4,  # Table 1
        decoder_heads: int = 3,  # Table 1
        norm_pix: bool = False,  # §3.4
    ):
        # MAE wants a mask_ratio. It is not used: `split` and `align_patches` make the mask.
        super().__init__(encoder, 0.5, decoder_dim, decoder_depth, decoder_heads, norm_pix)
        check_choice("alignment", alignment, Alignment)
        check_choice("selection", selection, Selection)
        check_range(1 / encoder.num_patches, 0.5, alpha=alpha)  # from one patch each on
        check_range(0, 1, object_floor=object_floor)
        check_range(1 / encoder.patch_size**2, 1, patch_share=patch_share)  # from one pixel on
        self.count = count_share(encoder.num_patches, alpha)
        self.alignment, self.selection = alignment, selection
        self.object_floor, self.patch_share = object_floor, patch_share

    def select(self, regions, batch):
        """The patches of two objects, [B, N] bool each; the second may be the first's background, or empty.

        regions: see `forward`. batch: the number of images.
        """
        whole = self.mask_token.new_ones(batch, self.encoder.num_patches, dtype=torch.bool)
        if regions is None:
            return whole, ~whole
        p, share = self.encoder.patch_size, self.patch_share
        if regions.is_floating_point():  # responses of a class activation map: the strongest patches (§4.3)
            inside = object_patches(regions[:, 0] > 0.3, p, share)  # Appendix A
            strength = patchify(regions[:, :1].clamp_min(0), p).mean(-1)
            return keep_patches(inside, 2 * self.count, strength), ~inside
        maps, found = select_objects(regions, 2, self.object_floor)
        first = object_patches(maps[:, 0], p, share) & found[:, :1]
        second = object_patches(maps[:, 1], p, share)
        return first, (second | ~found[:, 1:]) & ~first

    def split(self, regions, batch):
        """Source and target, [B, N] bool, disjoint, with 1 to `count` patches per image; see `select`."""
        first, second = self.select(regions, batch)
        if self.selection == "intra":
            unusable = first.sum(1, keepdim=True) < 2
            return divide_patches(first | unusable, self.count)
        unusable = ~(first.any(1, keepdim=True) & second.any(1, keepdim=True))
        half, other = divide_patches(torch.ones_like(first), self.count)
        source, target = torch.where(unusable, half, first), torch.where(unusable, other, second)
        swap = torch.rand(unusable.shape, device=unusable.device) < 0.5  # either is the source (Figure 6)
        source, target = torch.where(swap, target, source), torch.where(swap, source, target)
        return keep_patches(source, self.count), keep_patches(target, self.count)

    def forward(self, images, regions=None, ids_visible=None, ids_masked=None, keep_visible=None,
                keep_masked=None):
        """images [B, C, H, W] -> loss, pred, ids_visible, ids_masked, keep_visible, keep_masked.

        regions: integer label maps [B, L, H, W]; or class activation maps [B, 1, H, W], floats with maximum 1
            (`class_activation_map`); None for the whole image as one object.
        The last four arguments are the mask to use; keep_visible, keep_masked: [B, n] bool, False for the
            padding of alignment "zero"; None with the other alignments.
        """
        if regions is not None:
            check_maps(images, regions)
        kept = keep_visible is not None
        if kept != (keep_masked is not None) or kept and ids_visible is None:
            raise ValueError("keep_visible and keep_masked must be given together and with ids, or neither")
        if no_mask(ids_visible, ids_masked):
            source, target = self.split(regions, len(images))
            ids_visible, ids_masked, keep_visible, keep_masked = align_patches(
                source, target, self.count, self.alignment)
        keep = None
        if keep_visible is not None:
            keep = F.pad(torch.cat([keep_visible, keep_masked], dim=1), (1, 0), value=True)  # the class token
        latents = self.encoder(images, ids_visible, keep_visible)
        loss, pred = self.predict(images, latents, ids_visible, ids_masked, keep, keep_masked)
        return dict(loss=loss, pred=pred, ids_visible=ids_visible, ids_masked=ids_masked,
                    keep_visible=keep_visible, keep_masked=keep_masked)


# ---------------------------------------------------------------------------------------------------------
# 15. R-MAE and RAE
#
# the paper (Appendix A)           here                                         shape
# R, k                             region_maps, num_regions                     [B, k, H, W], binary
# beta_I = beta_R                  mask_ratio; the image and its regions share ids_visible
# beta_R alone (Figure 4)          region_mask_ratio; of the maps ids_shown, ids_hidden
# N (1 - beta), visible patches    n = n_visible
# p_E = p_D                        region_dim, dim below
# v_R (Eq. 1, 4, 7)                x in RegionBranch.encode                     [B, k, n, p*p]
# R-Encoder (Eq. 1, 4, 7)          RegionBranch.encode                          [B, k, n, dim]
# f                                proj
# v'_renc (Eq. 2, 5)               x in BatchBranch.forward                     [B * k, 1 + N, dim]
# v_penc                           latents                                      [B, 1 + n, D]
# v'_penc                          RegionBranch.fill                            [B, 1 + N, dim]
# [mask]                           neck_mask_token, mask_token                  [1, 1, dim]
# Neck, v_context (Eq. 9)          neck_block, context                          [B, 1 + N, dim]
# v_emb, v_query (Eq. 8, 10)       queries in LengthBranch.forward              [B, k, dim]
# R-Decoder (Eq. 3, 6, 10)         BatchBranch.blocks; LengthBranch.blocks, last_attn
# W, v_rdec (Eq. 11)               expand, x in LengthBranch.forward            [B, k, n_masked, dim]
# g                                head
# h (Eq. 12)                       region_feed
# AvgPool, P-Decoder (Eq. 14)      in RMAE.forward, MAE.decode                  [B, n, D]

Variant = Literal["length", "channel", "batch"]
CrossFeed = Literal["pixel_to_region", "region_to_pixel", "both"]


def sample_regions(regions, ids_visible, patch_size, num_regions, generator=None):
    """Draws regions that the visible patches show a part of (R-MAE, Appendix A, "Masking strategy").

    regions: label maps [B, L, H, W], uint8 or int64 from 0 to 255. Each layer holds disjoint regions, one for
        each label; 0 is no region, so that layers can be padded with zeros.
    ids_visible: [B, n], the patches of the maps that are seen, mostly those of the image.
    Returns bool maps [B, num_regions, H, W]: for each image uniform draws with replacement from its regions
    with at least one pixel inside a visible patch; empty maps if it has none.

    >>> regions = torch.tensor([[[[7, 7, 0, 9]]]])
    >>> sample_regions(regions, torch.tensor([[0, 2]]), patch_size=1, num_regions=2).int().tolist()
    [[[[1, 1, 0, 0]], [[1, 1, 0, 0]]]]
    """
    if regions.ndim != 4 or regions.dtype not in (torch.uint8, torch.int64):
        raise ValueError("regions must be label maps [B, L, H, W] of uint8 or int64, "
                         f"got {list(regions.shape)} of {regions.dtype}")
    visible = take(patchify(regions, patch_size), ids_visible).reshape(len(regions), -1, regions.shape[1])
    present = (region_areas(visible.transpose(1, 2)[..., None]) > 0).float()
    present[:, 0] = present.sum(1) == 0  # with no region at all, "nothing" is drawn, which is number 0
    # At least two draws: for a single one CUDA checks `present` first, and the host would wait for that.
    chosen = torch.multinomial(
        present, max(2, num_regions), replacement=True, generator=generator)[:, :num_regions]
    return binary_maps(regions, chosen) & (chosen > 0)[..., None, None]


def region_patches(region_maps, ids, patch_size, channels=1):
    """Maps [B, k, H, W] -> the patches `ids` [B, n] of each map: [B, k, n, p*p].

    channels: c, for patches of every c maps together: [B, k/c, n, p*p*c].
    """
    patches = take(patchify(region_maps, patch_size), ids)
    return patches.unflatten(-1, (patch_size**2, -1, channels)).permute(0, 3, 1, 2, 4).flatten(3)


def reconstruct_regions(region_maps, pred, ids_masked, patch_size):
    """Returns region maps [B, k, H, W] with the patches `ids_masked` [B, n] replaced by probabilities.

    pred: logits [B, k, n, p*p].
    """
    pred = pred.float().sigmoid().permute(0, 2, 3, 1).flatten(2)
    return reconstruct(region_maps.float(), pred, ids_masked, patch_size)


class RegionBranch(nn.Module):
    """Region encoder, entry of the neck and region predictor, which all variants have. All is `dim` wide.

    from_pixels: the neck gets the pixel encoder's output; if False, nothing but mask tokens.
    channels: number of region maps that make one sequence together: 1, or all k in the channel variant.
    num_visible: number of a map's patches that it sees; None for as many as of the image. `region_branch`
        sets it.
    """

    def __init__(self, encoder, from_pixels, dim, num_heads, channels=1):
        super().__init__()
        self.patch_size, self.channels = encoder.patch_size, channels
        patch_dim = encoder.patch_size**2 * channels
        self.embed = nn.Linear(patch_dim, dim)
        self.pos_embed = nn.Parameter(sincos_position_embedding(dim, encoder.grid), requires_grad=False)
        self.block, self.block_norm = Block(dim, num_heads), layer_norm(dim)  # R-Encoder
        self.proj = nn.Linear(dim, dim)  # f of Eq. 2, 5, 10
        self.neck_embed = nn.Linear(encoder.embed_dim, dim) if from_pixels else None
        self.neck_mask_token = learned_token(dim)
        self.norm = layer_norm(dim)
        self.head = nn.Sequential(  # g
            nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, patch_dim))

    def encode(self, region_maps, ids_visible):
        """Maps [B, k, H, W] -> embeddings [B, k, n, dim] of their visible patches, not yet pooled or normed.

        This is R-Encoder(v_R) of Eq. 1, 4, 7. In the channel variant there is 1 in the place of k.
        """
        k, c = region_maps.shape[1], self.channels
        if c not in (1, k):
            raise ValueError(f"the channel variant was built for num_regions={c} maps, got {k}")
        x = region_patches(region_maps, ids_visible, self.patch_size, c)  # v_R
        x = self.embed(x.to(self.embed.weight.dtype) - 0.5)
        x = x + F.embedding(ids_visible + 1, self.pos_embed[0]).unsqueeze(1)
        return self.block(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def fill(self, latents, ids_image):
        """Pixel encoder's output [B, 1 + n, D] -> v'_penc [B, 1 + N, dim], with mask tokens and positions."""
        x = self.neck_mask_token.expand(len(latents), self.pos_embed.shape[1], -1)
        if self.neck_embed is not None:
            x = put(x, F.pad(ids_image + 1, (1, 0)), self.neck_embed(latents))
        return x + self.pos_embed


class BatchBranch(RegionBranch):
    """The channel variant (Eq. 1-3) and the batch variant (Eq. 4-6).

    channels=k is the channel variant: all regions of an image are the channels of one sequence, so their
    number is fixed. channels=1 is the batch variant: each region is a sequence of its own, like another image
    of the batch.
    """

    def __init__(self, encoder, from_pixels, dim, num_heads, depth, channels):
        super().__init__(encoder, from_pixels, dim, num_heads, channels)
        self.mask_token = learned_token(dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))

    def forward(self, region_maps, latents, ids_visible, ids_masked, ids_image):
        """Maps [B, k, H, W], the image's latents [B, 1 + n, D] -> logits [B, k, n_masked, p*p] of the masked
        patches of the maps, and embeddings, see `encode`.

        ids_visible: the patches of the maps that are read.
        ids_image: the patches that the latents are of; in pre-training the same, but for a region_mask_ratio.
        """
        embeddings = self.encode(region_maps, ids_visible)  # Eq. 1, 4
        sequences = embeddings.shape[1]
        image = self.fill(latents, ids_image)  # v'_penc, the same for all sequences of an image
        ids_visible, ids_masked, image = (
            x.repeat_interleave(sequences, 0) for x in (ids_visible, ids_masked, image))
        filled = self.proj(self.block_norm(embeddings)).flatten(0, 1)
        x = put(self.mask_token.expand_as(image), ids_visible + 1, filled)  # v'_renc, Eq. 2, 5
        x = x + image
        for block in self.blocks:  # Eq. 3, 6
            x = block(x)
        pred = self.head(self.norm(take(x[:, 1:], ids_masked)))
        pred = pred.unflatten(-1, (-1, self.channels)).unflatten(0, (-1, sequences))
        return pred.permute(0, 1, 4, 2, 3).flatten(1, 2), embeddings


class CrossBlock(Block):
    """Self-attention, cross-attention to a context [B, n, D], MLP: [B, m, D] -> [B, m, D], pre-norm.

    The context is not normed again, as R-MAE's neck ends in a norm.
    """

    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        self.cross_attn = CrossAttention(dim, num_heads, norm_context=False)

    def forward(self, x, context):
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(x, context, context)
        return x + self.mlp(self.norm2(x))


class LengthBranch(RegionBranch):
    """The length variant (Eq. 7-11): regions as queries.

    Each region is pooled into one query, and the queries of an image are one sequence. Any number of regions
    goes in, and their order does not matter.
    """

    def __init__(self, encoder, from_pixels, dim, num_heads, depth):
        super().__init__(encoder, from_pixels, dim, num_heads)
        self.neck_block, self.neck_norm = Block(dim, num_heads), layer_norm(dim)
        self.blocks = nn.ModuleList(CrossBlock(dim, num_heads) for _ in range(depth - 1))
        self.last_norm, self.last_attn = layer_norm(dim), Attention(dim, num_heads)
        self.expand = nn.Linear(dim, dim)  # W of Eq. 11

    def forward(self, region_maps, latents, ids_visible, ids_masked, ids_image):
        """As BatchBranch.forward."""
        embeddings = self.encode(region_maps, ids_visible)
        context = self.neck_norm(self.neck_block(self.fill(latents, ids_image)))  # Eq. 9
        # Eq. 7, 8 and f. The authors' code norms the mean, not each patch.
        queries = self.proj(self.block_norm(embeddings.mean(2)))
        # Eq. 10, all blocks of the decoder but the last: none at all by default, with region_decoder_depth=1.
        for block in self.blocks:
            queries = block(queries, context)
        # The last block: self-attention gives v_query, then Eq. 11 stands in the place of cross-attention:
        # each query is added to the image's features at every patch. From here on patches do not mix, so the
        # masked ones are enough.
        queries = queries + self.last_attn(self.last_norm(queries))
        x = self.expand(take(context[:, 1:], ids_masked)).unsqueeze(1) + queries.unsqueeze(2)
        return self.head(self.norm(x)), embeddings


def region_branch(encoder, variant, mask_ratio, num_regions, from_pixels, dim, num_heads, depth):
    """The region branch of a variant, with initial weights; mask_ratio: of the maps alone, or None;
    from_pixels: see `RegionBranch`."""
    check_choice("variant", variant, Variant)
    check_range(1, num_regions=num_regions)
    check_transformer(dim, num_heads, depth, ("region_dim", "region_heads", "region_decoder_depth"))
    if variant == "length":
        branch = LengthBranch(encoder, from_pixels, dim, num_heads, depth)
    else:
        channels = num_regions if variant == "channel" else 1
        branch = BatchBranch(encoder, from_pixels, dim, num_heads, depth, channels)
    N = encoder.num_patches
    branch.num_visible = None
    if mask_ratio is not None:
        branch.num_visible = N - count_masked(N, mask_ratio, round_up=True, name="region_mask_ratio")
    return branch.apply(init_weights)


class RAE(nn.Module):
    """Masked region autoencoding (§3.1), the half of R-MAE that is new. Nguyen, Aggarwal, Li, Oswald,
    Kirillov, Snoek, Chen, "R-MAE: Regions Meet Masked Autoencoders", ICLR 2024, arXiv:2306.05411.

    New: binary maps of a few regions of the image are masked and completed, from their visible patches and
    from the image's. A region's visible patches are pooled into one query, which is added to the image's
    features at every place and so becomes a map again (the length variant). So more regions cost next to
    nothing, and their order does not matter. There is no pixel decoder and no pixel loss: the image feeds the
    regions, which trains the encoder.

    mask_ratio: share of the patches that is masked, in the image and in the maps
    region_mask_ratio: share that is masked in the maps alone (Figure 4), by the same order of patches as the
        image: the smaller mask is a part of the larger; None is mask_ratio
    num_regions: binary maps drawn per image, k
    variant: length pools each region into a query; batch makes each a sequence of its own; channel makes all
        of them the channels of one image (Appendix A)
    region_dim: width of the region encoder, the neck and the region decoder
    region_heads: attention heads of their blocks
    region_decoder_depth: blocks of the region decoder, counting the last one, which expands the queries

    Where the paper is silent: maps enter as -0.5 and 0.5; a norm ends the region encoder (in the length
    variant after the mean, as in the authors' code) and the neck; the class token goes through the neck
    (length) or the decoder (batch, channel); the predictor's layers have GELU between. The batch and the
    channel variant have no block in the neck: Eq. 3 and 6 name none, §3.1 has one before all variants.
    Departs from the paper: p_E and p_D are one number, region_dim (Table 8 has 128 and 256); the last block
    of the length variant has no MLP but the predictor (in Appendix A each block has a feed-forward). The
    authors' released configuration has a base learning rate of 1.5e-4 and 8 blocks in the neck, draws regions
    without replacement where an image has eight and without the rule of visible foreground, and warms up for
    8% of the epochs on COCO; here as in the paper. With its `num_region: 0` it trains none as it stands.
    In small trainings the encoder can collapse: the maps' visible patches and usual shapes lower the loss,
    which is then the same with another image. So a low loss shows little without this control.
    """

    inputs = ("regions",)
    encoder_options = {}

    def __init__(
        self,
        encoder: ViT,
        mask_ratio: float = 0.75,  # §4.1
        region_mask_ratio: float | None = None,  # §4.1: as of the image
        num_regions: int = 8,  # §4.1
        variant: Variant = "length",  # §3.1
        region_dim: int = 128,  # §4.1
        region_heads: int = 8,  # the authors' code
        region_decoder_depth: int = 1,  # §4.1
    ):
        super().__init__()
        count_masked(encoder.num_patches, mask_ratio, round_up=True)
        self.encoder, self.mask_ratio, self.num_regions = encoder, mask_ratio, num_regions
        self.region_branch = region_branch(
            encoder, variant, region_mask_ratio, num_regions, True, region_dim, region_heads,
            region_decoder_depth)

    def complete_masked(self, images, regions, ids_visible, ids_masked, region_maps):
        """Masks, encodes and completes; the arguments are those of `forward`. The mask comes first, then
        regions that it shows (Appendix A).

        Returns three things: the dict of `forward` without its loss, the image's latents [B, 1 + n, D], and
        the regions' embeddings.
        """
        check_maps(images, regions if region_maps is None else region_maps)
        p = self.encoder.patch_size
        if no_mask(ids_visible, ids_masked):
            ids_visible, ids_masked = random_masking(
                len(images), self.encoder.num_patches, self.mask_ratio, images.device)
        ids_visible, ids_masked = (ids.expand(len(images), -1) for ids in (ids_visible, ids_masked))
        shown = self.region_branch.num_visible or ids_visible.shape[1]
        ids_shown, ids_hidden = torch.cat([ids_visible, ids_masked], dim=1).tensor_split([shown], dim=1)
        if region_maps is None:
            region_maps = sample_regions(regions, ids_shown, p, self.num_regions)
        latents = self.encoder(images, ids_visible)
        pred, embeddings = self.region_branch(region_maps, latents, ids_shown, ids_hidden, ids_visible)
        loss = region_loss(pred, region_patches(region_maps, ids_hidden, p))
        out = dict(loss_region=loss, pred_regions=pred, region_maps=region_maps, ids_visible=ids_visible,
                   ids_masked=ids_masked, ids_masked_regions=ids_hidden)
        return out, latents, embeddings

    def forward(self, images, regions=None, ids_visible=None, ids_masked=None, region_maps=None):
        """images [B, C, H, W], regions [B, L, H, W] (see `sample_regions`) -> loss and loss_region, which is
        the same; pred_regions [B, k, n, p*p], logits of the patches ids_masked_regions of the maps;
        region_maps, ids_visible, ids_masked.

        ids_visible, ids_masked: the mask to use.
        region_maps: the binary maps [B, k, H, W] to use; None draws them from regions.
        """
        out = self.complete_masked(images, regions, ids_visible, ids_masked, region_maps)[0]
        return dict(loss=out["loss_region"], **out)

    @torch.no_grad()
    def complete(self, images, hints, ids_visible, ids_image=None):
        """Interactive segmentation (Figure 6): hints, binary maps [B, k, H, W] -> probabilities [B, k, H, W].

        Only the patches ids_visible [B, n] of the hints are read, and they are returned as they are.
        ids_image: the patches of the images [B, C, H, W] that the encoder sees; None for ids_visible, as in
            pre-training (Figure 6 gives the whole image).
        """
        check_maps(images, hints)
        check_range(1, visible_patches=ids_visible.shape[1])
        ids_image = ids_visible if ids_image is None else ids_image
        ids_visible, ids_image = (ids.expand(len(images), -1) for ids in (ids_visible, ids_image))
        k, channels = hints.shape[1], self.region_branch.channels
        if k < channels:  # the channel variant: the hints are repeated to fill its channels
            hints = hints.repeat(1, channels, 1, 1)[:, :channels]
        visible = images.new_zeros(len(images), self.encoder.num_patches).scatter(1, ids_visible, 1.0)
        ids_masked = visible.argsort(dim=1, stable=True)[:, : visible.shape[1] - ids_visible.shape[1]]
        latents = self.encoder(images, ids_image)
        pred, _ = self.region_branch(hints, latents, ids_visible, ids_masked, ids_image)
        return reconstruct_regions(hints, pred, ids_masked, self.encoder.patch_size)[:, :k]


class RMAE(MAE):
    """Region-aware masked autoencoder (§3.2): `RAE` and `MAE` with one encoder and one mask.

    New: see `RAE`. Its region branch stands here beside MAE's pixel decoder, and the two losses are added.

    region_mask_ratio: share of the patches that is masked in the maps alone (Figure 4); see `RAE`
    num_regions: binary maps drawn per image, k
    variant: length pools each region into a query; batch makes each a sequence of its own; channel makes all
        of them the channels of one image (Appendix A)
    cross_feed: whether pixels help to complete regions, regions to complete pixels (Eq. 12-14), or both
    region_dim: width of the region encoder, the neck and the region decoder
    region_heads: attention heads of their blocks
    region_decoder_depth: blocks of the region decoder, counting the last one, which expands the queries

    Where the paper is silent, and where this departs from it: see `RAE`. With region_to_pixel the neck gets
    mask tokens alone. h (Eq. 12) is added before MAE's linear decoder_embed, not after, and without a second
    [mask] token: as expressive if embed_dim >= decoder_dim and image and maps have one mask. With a
    region_mask_ratio, only patches that both show get it.
    """

    inputs = ("regions",)
    # They use only what both classes have.
    complete_masked, complete = RAE.complete_masked, RAE.complete

    def __init__(
        self,
        encoder: ViT,
        mask_ratio: float = 0.75,  # as RAE
        region_mask_ratio: float | None = None,  # as RAE
        num_regions: int = 8,  # as RAE
        variant: Variant = "length",  # as RAE
        cross_feed: CrossFeed = "pixel_to_region",  # §3.2
        region_dim: int = 128,  # as RAE
        region_heads: int = 8,  # as RAE
        region_decoder_depth: int = 1,  # as RAE
        decoder_dim: int = 512,  # §3, as MAE
        decoder_depth: int = 8,  # §3, as MAE
        decoder_heads: int = 16,  # as MAE
        norm_pix: bool = True,  # as MAE
    ):
        super().__init__(encoder, mask_ratio, decoder_dim, decoder_depth, decoder_heads, norm_pix)
        check_choice("cross_feed", cross_feed, CrossFeed)
        self.num_regions = num_regions
        self.region_branch = region_branch(
            encoder, variant, region_mask_ratio, num_regions, cross_feed != "region_to_pixel", region_dim,
            region_heads, region_decoder_depth)
        self.region_feed = None
        if cross_feed != "pixel_to_region":
            self.region_feed = nn.Linear(region_dim, encoder.embed_dim).apply(init_weights)  # h of Eq. 12

    def forward(self, images, regions=None, ids_visible=None, ids_masked=None, region_maps=None):
        """As RAE.forward, with pred and loss_pixel; loss is the sum of loss_pixel and loss_region."""
        out, latents, embeddings = self.complete_masked(images, regions, ids_visible, ids_masked, region_maps)
        if self.region_feed is not None:  # Eq. 12-14
            fed = self.region_feed(self.region_branch.block_norm(embeddings).mean(1))
            # Nothing is added to the class token, or to patches that image and maps do not both show.
            latents = latents + F.pad(fed, (0, 0, 1, latents.shape[1] - 1 - fed.shape[1]))
        loss_pixel, pred = self.predict(images, latents, out["ids_visible"], out["ids_masked"])
        # Both losses have the same weight (§3.2).
        return dict(loss=out["loss_region"] + loss_pixel, loss_pixel=loss_pixel, pred=pred, **out)


# ---------------------------------------------------------------------------------------------------------
# 16. Tokenizer, for LoMaR, BEiT and CAE
#
# A tokenizer gives each patch its token. Methods get tokens [B, N] as an input of forward and never see a
# tokenizer. Any module will do that has `vocab_size` and tokenize(images, grid) -> tokens [B, N] of the
# patches in raster order.
#
# the paper (DALL-E)               here                                         shape
# x, image                         images                                       [B, 3, H, W]
# K, vocabulary                    vocab_size                                   8192
# z, image tokens                  ids, tokens                                  [B, h, w]
# q_phi, its logits                encoder, logits                              [B, V, h, w]
# p_theta                          decoder
# tau, relaxation temperature      tau in forward
# beta, KL weight                  kl_weight


class DVAEConv(nn.Module):
    """Convolution that keeps height and width: [B, C_in, h, w] -> [B, C_out, h, w]."""

    def __init__(self, dim_in, dim_out, kernel_size):
        super().__init__()
        w = torch.randn(dim_out, dim_in, kernel_size, kernel_size)
        self.w = nn.Parameter(w / math.sqrt(dim_in * kernel_size**2))
        self.b = nn.Parameter(torch.zeros(dim_out))

    def forward(self, x):
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class DVAEBlock(nn.Module):
    """DALL-E's bottleneck block: id_path(x) + gain * res_path(x), [B, C_in, h, w] -> [B, C_out, h, w]."""

    def __init__(self, dim_in, dim_out, kernel_sizes, gain):
        super().__init__()
        self.gain = gain
        self.id_path = nn.Identity() if dim_in == dim_out else DVAEConv(dim_in, dim_out, 1)
        dims, self.res_path = [dim_in] + 3 * [dim_out // 4] + [dim_out], nn.Sequential()
        for i, kernel_size in enumerate(kernel_sizes, start=1):
            self.res_path.add_module(f"relu_{i}", nn.ReLU())
            self.res_path.add_module(f"conv_{i}", DVAEConv(dims[i - 1], dims[i], kernel_size))

    def forward(self, x):
        return self.id_path(x) + self.gain * self.res_path(x)


def dvae_layers(first, dim, widths, blocks_per_group, kernel_sizes, resize, last):
    """DALL-E's encoder or decoder: `first`, which ends in `dim` channels; a group of blocks for each of the
    widths, with `resize` between groups; and `last`."""
    layers = nn.Sequential(OrderedDict(input=first))
    gain = 1 / (len(widths) * blocks_per_group) ** 2
    for g, width in enumerate(widths, start=1):
        group = nn.Sequential()
        for b in range(1, blocks_per_group + 1):
            group.add_module(f"block_{b}", DVAEBlock(dim, width, kernel_sizes, gain))
            dim = width
        if g < len(widths):
            group.resize = resize
        layers.add_module(f"group_{g}", group)
    layers.output = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=last))
    return nn.Sequential(OrderedDict(blocks=layers))


@torch.no_grad()
def initialise_words(encoder, decoder):
    """Changes a DVAE's initial weights, so that it uses many words from the start."""
    # Pixels in [0.1, 0.9] differ little beside their mean, and the same word would win everywhere. So the
    # first layer takes the mean off and widens the rest to unit variance; the last ignores a common shift.
    first, last = encoder.input, encoder.output.conv
    first.w *= 5
    first.b.copy_(-0.46 * first.w.sum((1, 2, 3)))
    last.w -= last.w.mean(1, keepdim=True)
    # A one-hot word reaches one column of this matrix: its fan-in is 1.
    decoder.input.w *= math.sqrt(decoder.input.w.shape[1])


class DVAE(nn.Module):
    """Discrete VAE, the tokenizer of BEiT and CAE. Ramesh et al., "Zero-Shot Text-to-Image Generation"
    (DALL-E), ICML 2021, arXiv:2102.12092, §2.1 and App. A.

    New: an image becomes a small grid of words from a learned vocabulary. In training a word is a relaxed
    one-hot vector (Gumbel-softmax), which is sharper as its temperature falls, so that reconstruction trains
    the choice of words, too.

    image_size: pixels of its training images, an int or (height, width); any image must be a multiple of
        factor = 2^(groups - 1), a token's side in pixels
    vocab_size: number of different tokens
    hidden_dim: channels of the first group of blocks; each group has twice the channels of the one before
    groups: groups of blocks, with a halving of height and width between them
    blocks_per_group: residual blocks of each group
    kl_weight: weight of a token's KL(q(word | image) || uniform) in nats, divided by the 3 * factor^2 values
        that it stands for; App. A.2 has 6.6 beside a log-likelihood, and 2 is about as strong beside an mse
        near 0.2
    tau_start: temperature at the start; it falls along a half-cosine (App. A.2)
    tau_end: temperature at the end

    The state dict of DALL-E's released encoder loads into `encoder` with strict=True at the default sizes.
    Departs from the paper: the decoder ends in RGB under mse, not in the parameters of a logit-Laplace;
    kl_weight is not raised from 0, as it is early that it keeps words in use; the temperature falls over all
    of training, not its first 20th; the weights are not averaged over the steps; and the initialisation,
    without which a short training collapses onto a few words.
    """

    inputs = ("progress",)

    def __init__(
        self,
        image_size=112,
        vocab_size: int = 8192,  # §2.1
        hidden_dim: int = 256,  # the authors' code
        groups: int = 4,  # the authors' code
        blocks_per_group: int = 2,  # the authors' code
        kl_weight: float = 2.0,  # ours
        tau_start: float = 1.0,  # App. A.2
        tau_end: float = 1 / 16,  # App. A.2
    ):
        super().__init__()
        check_range(1, vocab_size=vocab_size, hidden_dim=hidden_dim, groups=groups,
                    blocks_per_group=blocks_per_group)
        check_range(0, kl_weight=kl_weight)
        check_range(1e-3, tau_start=tau_start)
        if hidden_dim % 4:
            raise ValueError(f"hidden_dim must be a multiple of 4, got {hidden_dim}")
        check_range(1e-3, tau_start, tau_end=tau_end)
        self.image_size, self.vocab_size, self.factor = pair(image_size), vocab_size, 2 ** (groups - 1)
        if any(s < 1 or s % self.factor for s in self.image_size):
            raise ValueError(f"image_size must be a positive multiple of {self.factor}, got {image_size}")
        self.kl_weight, self.tau_start, self.tau_end = kl_weight, tau_start, tau_end
        widths = [hidden_dim * 2**g for g in range(groups)]
        self.encoder = dvae_layers(
            DVAEConv(3, hidden_dim, 7), hidden_dim, widths, blocks_per_group, (3, 3, 3, 1), nn.MaxPool2d(2),
            DVAEConv(widths[-1], vocab_size, 1))
        self.decoder = dvae_layers(
            DVAEConv(vocab_size, hidden_dim // 2, 1), hidden_dim // 2, widths[::-1], blocks_per_group,
            (1, 3, 3, 3), nn.Upsample(scale_factor=2), DVAEConv(hidden_dim, 3, 1))
        for name, values in (("mean", [0.485, 0.456, 0.406]), ("std", [0.229, 0.224, 0.225])):  # ImageNet's
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        initialise_words(self.encoder.blocks, self.decoder.blocks)

    @classmethod
    def from_encoder(cls, state):
        """A state dict of DALL-E's encoder, of any size -> the DVAE with that encoder, without decoder."""
        first = state.get("blocks.input.w")
        if first is None:
            raise ValueError("no tokenizer in it: no parameter is named blocks.input.w")
        blocks = {tuple(k.split(".")[1:3]) for k in state if ".block_" in k}
        groups = len({group for group, _ in blocks})
        tokenizer = cls(2 ** (groups - 1), len(state["blocks.output.conv.w"]), len(first), groups,
                        len(blocks) // groups)
        tokenizer.encoder.load_state_dict(state)
        tokenizer.decoder = None
        return tokenizer

    def logits(self, images):
        """Normalised images [B, 3, H, W] -> logits of words [B, V, H/factor, W/factor]."""
        H, W = images.shape[-2:]
        if H % self.factor or W % self.factor:
            raise ValueError(f"image height and width must be divisible by {self.factor}, got {H}x{W}")
        pixels = (images.float() * self.std + self.mean).clamp(0, 1)
        pixels = 0.8 * pixels + 0.1  # DALL-E's map_pixels, App. A.3
        return self.encoder(pixels.to(self.mean.dtype)).float()

    @torch.no_grad()
    def tokens(self, images):
        """Normalised images [B, 3, H, W] -> token ids [B, H/factor, W/factor].

        In float32 under autocast, too, as BEiT's code: bfloat16 would often name another token.
        """
        with torch.autocast(images.device.type, enabled=False):
            return self.logits(images).argmax(1)

    def tokenize(self, images, grid):
        """Normalised images [B, 3, H, W] -> token ids [B, gh*gw], one for each patch of a (gh, gw) grid.

        The image is resized to factor pixels a patch, bicubic and antialiased, on its device. CAE's code does
        so on the CPU, with a Lanczos filter.
        """
        size = [self.factor * g for g in grid]
        images = F.interpolate(images.float(), size=size, mode="bicubic", antialias=True, align_corners=False)
        return self.tokens(images).flatten(1)

    @torch.no_grad()
    def decode(self, tokens, grid):
        """Token ids [B, gh*gw] -> normalised images [B, 3, gh * factor, gw * factor]."""
        words = F.one_hot(tokens.unflatten(1, grid), self.vocab_size).permute(0, 3, 1, 2)
        return self.decoder(words.to(self.mean.dtype))

    def forward(self, images, progress=0.0):
        """Normalised images [B, 3, H, W] -> loss, loss_pixel (mse of normalised values), loss_kl (nats per
        token), pred [B, 3, H, W], ids [B, h, w]; perplexity and codes_used of the batch's ids, both in 1..V,
        to watch for collapse.

        progress: the fraction of training done, a tensor or number in [0, 1], which sets the temperature.
        In eval mode the words are the most probable ones, without noise: what tokens() gives.
        """
        logits = self.logits(images)
        ids = logits.argmax(1)
        if self.training:
            cosine = torch.cos(math.pi * torch.as_tensor(progress, device=logits.device))
            tau = self.tau_end + (self.tau_start - self.tau_end) * (1 + cosine) / 2
            words = F.gumbel_softmax(logits, tau, dim=1)
        else:
            words = torch.zeros_like(logits).scatter_(1, ids.unsqueeze(1), 1.0)
        pred = self.decoder(words.to(self.mean.dtype))
        loss_pixel = F.mse_loss(pred.float(), images.float())
        log_q = logits.log_softmax(1)
        loss_kl = (log_q.exp() * (log_q + math.log(self.vocab_size))).sum(1).mean()
        count = log_q.new_zeros(self.vocab_size).scatter_add_(0, ids.flatten(), log_q.new_ones(ids.numel()))
        perplexity = torch.special.entr(count / ids.numel()).sum().exp()
        loss = loss_pixel + self.kl_weight / (3 * self.factor**2) * loss_kl
        return dict(loss=loss, loss_pixel=loss_pixel, loss_kl=loss_kl, pred=pred, ids=ids,
                    perplexity=perplexity, codes_used=(count > 0).sum())


# ---------------------------------------------------------------------------------------------------------
# 17. Loading weights


def load_file(path):
    """A checkpoint file -> what torch.save wrote, tensors and plain types only; ValueError in one line."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the MAE release's arguments are one
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file raises almost anything, a missing one an OSError
        reason = getattr(error, "strerror", None) or "not a whole PyTorch checkpoint of plain tensors"
        raise ValueError(f"cannot read {path}: {reason}") from None


def read_checkpoint(source):
    """A checkpoint file, or what it held, -> its plain state dict of tensors.

    Takes this project's checkpoint.pt and encoder.pt, the MAE release's files ({"model": ...}) and timm's
    state dicts; if a file holds several, as DINO's, all of them, each name prefixed ("teacher.").
    ValueError, in one line that names the file, for anything else.
    """
    is_file = isinstance(source, (str, os.PathLike))
    state = load_file(source) if is_file else source
    state = state if isinstance(state, dict) else {}
    for key in ("model", "state_dict"):
        if isinstance(state.get(key), dict):
            state = state[key]
    if not any(isinstance(v, torch.Tensor) and v.ndim > 0 for v in state.values()):
        for name, part in list(state.items()):
            if isinstance(part, dict):
                state = state | {f"{name}.{k}": v for k, v in part.items()}
    tensors = OrderedDict((k, v) for k, v in state.items() if torch.is_tensor(v) and v.is_floating_point())
    tensors._metadata = getattr(state, "_metadata", {})
    if not tensors:
        raise ValueError(f"there is no state dict of tensors in {source if is_file else 'it'}; "
                         f"{listed(state)}")
    return tensors


def listed(state):
    """A few of a dict's names for an error message: "it has a, b, c, d, ..."."""
    names = [str(name) for name in state] if isinstance(state, dict) else []
    return f"it has {', '.join(names[:4]) or 'no names'}{', ...' * (len(names) > 4)}"


def encoder_prefixes(state):
    """The prefixes of the ViTs' parameters in a state dict: [""], ["encoder."], ["base.encoder."], ...

    If there are several ViTs, the first is the one that their papers evaluate: DINO's teacher, MoCo v3's
    base encoder.
    """
    suffix = "patch_embed.proj.weight"
    found = [k.removesuffix(suffix) for k in state if k.endswith(suffix)]
    if not found:
        raise ValueError(f"no Vision Transformer in these weights: no parameter is named {suffix}; "
                         f"{listed(state)}")
    return sorted(found, key=lambda prefix: "student" in prefix or "momentum" in prefix)


def split_encoder(state):
    """A state dict -> the ViT's part of it, with its own names, and the names of the rest. ValueError for
    parameters that change the output and that `ViT` does not have."""
    prefix = encoder_prefixes(state)[0]
    # BEiT's and CAE's code has names of its own (gamma_1, q_bias, v_bias), and no bias of the keys.
    inside = {re.sub(r"gamma_(\d)$", r"ls\1.gamma", k.removeprefix(prefix)): v
              for k, v in state.items() if k.startswith(prefix)}
    for name in [k for k in inside if k.endswith("q_bias")]:
        q, v = inside.pop(name), inside.pop(name.replace("q_bias", "v_bias"))
        inside[name.replace("q_bias", "qkv.bias")] = torch.cat([q, 0 * q, v])
    for name in inside:
        if name.startswith(("reg_token", "register_tokens", "dist_token", "norm_pre.", "rel_pos_bias.",
                            "rope", "patch_embed.norm", "patch_embed.backbone")):
            raise ValueError(f"another architecture: there is no {name} here")
    return inside, [k for k in state if not k.startswith(prefix)]


def grid_of(table, likely=(0, 0)):
    """The (gh, gw) grid that a position table [1, 1+N, D] was made for.

    A sine-cosine table is recognised. Another is taken for that of `likely` if this has N patches, else for
    square.
    """
    N, D = table.shape[1] - 1, table.shape[2]
    for gh in range(1, N + 1):
        if N % gh == 0 and D % 4 == 0:
            fixed = sincos_position_embedding(D, (gh, N // gh))
            if torch.allclose(table.float(), fixed, atol=1e-3):
                return gh, N // gh
    if math.prod(likely) == N:
        return likely
    side = math.isqrt(N)
    if side**2 == N:
        return side, side
    raise ValueError(f"a position table of a class token and {N} patches, neither sine-cosine nor of a "
                     "square grid")


def resize_position_embedding(table, grid, likely=(0, 0)):
    """Bicubic resizing of a position table [1, 1+N, D] (class token first) to a (gh, gw) grid; likely: see
    `grid_of`."""
    patches = table[:, 1:].float().unflatten(1, grid_of(table, likely)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)


def load_weights(module, state, grid, likely=None, may_miss=()):
    """Loads `state` into `module` and returns (missing, left_over), two lists of names.

    Position tables of another grid are resized to `grid`; likely: that of a learned table, see `grid_of`
    (None: `grid`). Raises ValueError, and loads nothing, if a shape differs, if a parameter is missing whose
    name does not start with one of `may_miss`, or if the state has a block, or a parameter in a block, that
    the module has not.
    """
    own, state = module.state_dict(), dict(state)
    for key in [k for k in own if k in state]:
        new, shape = state[key], own[key].shape
        same_width = new.shape[::2] == shape[::2]  # [1, 1+N, D], but for N
        if key.endswith("pos_embed") and same_width and grid_of(new, likely or grid) != grid:
            state[key] = resize_position_embedding(new, grid, likely or grid)
        elif new.shape != shape:
            raise ValueError(f"{key} is {list(new.shape)} in the checkpoint, {list(shape)} here: "
                             "another model or patch size")
    missing, left_over = [k for k in own if k not in state], [k for k in state if k not in own]
    stacks = tuple(k.split("blocks.")[0] + "blocks." for k in own if "blocks." in k)
    foreign = [k for k in left_over if k.startswith(stacks)]
    if foreign:
        raise ValueError(f"another architecture: there is no {foreign[0]} here")
    lacking = [k for k in missing if not k.startswith(tuple(may_miss))]
    if lacking:
        raise ValueError(f"the checkpoint lacks {len(lacking)} of {len(own)} parameters, {lacking[0]} first; "
                         f"{listed(state)}")
    module.load_state_dict(state, strict=False)
    return missing, left_over


def load_encoder(encoder, source):
    """Loads a ViT from any checkpoint that `read_checkpoint` takes; returns (missing, left_over) names.

    A missing last norm is allowed: models fine-tuned with mean pooling have none. What is not the ViT's, such
    as a decoder, is left over.
    """
    state = read_checkpoint(source)
    inside, outside = split_encoder(state)
    size = state._metadata.get("", {}).get("image_size", encoder.image_size)  # encoder.pt tells it
    likely = tuple(side // encoder.patch_size for side in size)
    missing, left_over = load_weights(encoder, inside, encoder.grid, likely, may_miss=("norm.",))
    return missing, left_over + outside


def load_mae(mae, source):
    """Loads an MAE with its decoder, from the release's full files or ours; returns (missing, left_over)."""
    state = read_checkpoint(source)
    outer = encoder_prefixes(state)[0].removesuffix("encoder.")
    state = {k.removeprefix(outer): v for k, v in state.items()}
    own = ("encoder.", "decoder_", "mask_token")  # the release's encoder has no prefix
    state = {k if k.startswith(own) else f"encoder.{k}": v for k, v in state.items()}
    return load_weights(mae, state, mae.encoder.grid)


def vit_from_checkpoint(source, image_size=None, num_heads=None):
    """Builds the ViT that fits a checkpoint and loads it: (vit, (missing, left_over)).

    All sizes are read off the tensors but the number of heads, which the literature's sizes imply; other
    ViTs are taken to have 64 channels a head. MoCo v3's ViT-S has 12 heads, not 6; its full checkpoints are
    recognised, for others give num_heads. The metadata of train.py's encoder.pt tell image size and heads.
    image_size: None for what the position table was made for.
    """
    state = read_checkpoint(source)
    inside, _ = split_encoder(state)
    known = state._metadata.get("", {})
    image_size, num_heads = image_size or known.get("image_size"), num_heads or known.get("num_heads")
    embed_dim, channels, patch_size, _ = inside["patch_embed.proj.weight"].shape
    depth = len({k.split(".")[1] for k in inside if k.startswith("blocks.")})
    relative = inside.get("blocks.0.attn.relative_table")
    heads = {(size["embed_dim"], size["depth"]): size["num_heads"] for size in SIZES.values()}
    if "base_encoder" in encoder_prefixes(state)[0]:  # MoCo v3, arXiv:2104.02057
        heads[384, 12] = 12
    num_heads = num_heads or heads.get((embed_dim, depth)) or max(1, embed_dim // 64)
    if relative is not None:
        num_heads = embed_dim // relative.shape[1]
    if image_size is None:
        if "pos_embed" not in inside:
            raise ValueError("give image_size: the checkpoint has no position table to tell it")
        image_size = [g * patch_size for g in grid_of(inside["pos_embed"])]
    hidden = inside.get("blocks.0.mlp.fc1.weight")
    if hidden is None:
        raise ValueError("another architecture: no parameter is named blocks.0.mlp.fc1.weight")
    layer_scale = 0.1 if "blocks.0.ls1.gamma" in inside else None  # its value is loaded
    mlp_ratio = (len(hidden) + 0.5) / embed_dim  # which is rounded down
    vit = ViT(image_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, 0.0,
              relative is not None, layer_scale, channels)
    return vit, load_encoder(vit, state)


# ---------------------------------------------------------------------------------------------------------
# 18. The methods by name

METHODS = {"mae": MAE, "simmim": SimMIM, "beit": BEiT, "amt": AMT, "lomar": LoMaR, "objmae": ObjMAE,
           "rae": RAE, "rmae": RMAE, "cae": CAE, "dvae": DVAE}

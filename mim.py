"""Masked image modeling, one class a paper, on a plain Vision Transformer.

MAE, SimMIM, BEiT; AMT, LoMaR, ObjMAE, R-MAE and RAE, CAE; and the tokenizer of those that predict tokens.

The file reads top to bottom: tensor helpers, the ViT, loading weights, masking functions, losses, and
then one class a paper. A class and the named pieces that it uses run elsewhere unchanged.

Notation: B images [B, 3, H, W]; p the patch side in pixels; N = gh * gw patches on a (gh, gw) grid; D the
encoder's width; `ids_*` integer index tensors [B, n] into 0..N-1 in raster order. Every method returns a dict: `loss`
and its parts; `pred`, pixels [B, n_masked, p*p*3] or logits of tokens [B, n_masked, V] (RAE: `pred_regions`);
`ids_visible`, `ids_masked`. DVAE, the tokenizer, has a dict of its own.
"""

import argparse
import math
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth, roi_align

# ---------------------------------------------------------------------------------------------------------
# Patches and index tensors


def patchify(images, patch_size):
    """[B, C, H, W] -> [B, N, p*p*C]: patches in raster order, inside a patch (row, column, channel)."""
    B, C, H, W = images.shape
    p = patch_size
    if H % p or W % p:
        raise ValueError(f"image height and width must be divisible by patch_size={p}, got {H}x{W}")
    x = images.reshape(B, C, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)


def unpatchify(patches, patch_size, grid):
    """[B, N, p*p*C] -> [B, C, gh*p, gw*p], the inverse of `patchify` for a (gh, gw) grid."""
    B, (gh, gw), p = len(patches), grid, patch_size
    x = patches.reshape(B, gh, gw, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, gh * p, gw * p)


def take(x, ids):
    """The rows `ids` [B, n] of x [B, N, D] -> [B, n, D]."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def put(x, ids, rows):
    """A copy of x [B, N, D] in which the rows `ids` [B, n] are `rows` (broadcast to [B, n, D])."""
    ids = ids.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    return x.scatter(1, ids, rows.to(x.dtype).expand_as(ids))


def pair(size):
    """An int or a (height, width) pair -> (height, width)."""
    return (size, size) if isinstance(size, int) else tuple(size)


# ---------------------------------------------------------------------------------------------------------
# Vision Transformer


def sincos_position_embedding(dim, grid):
    """Fixed 2-D sine-cosine table [1, 1 + gh*gw, dim] for a (gh, gw) grid; the class token's row is zero.

    The first half of the channels encodes the column, the second half the row; inside a half all sines come
    first, then all cosines, at frequencies 1 / 10000^(i / (dim/4)).
    """
    if dim % 4:
        raise ValueError(f"a 2-D sine-cosine embedding needs a width divisible by 4, got {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(*(torch.arange(g, dtype=torch.float64) for g in grid), indexing="ij")
    angles = [torch.outer(x.flatten(), omega) for x in (column, row)]
    table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)
    return F.pad(table.float(), (0, 0, 1, 0)).unsqueeze(0)


NUM_BUCKETS = 50  # 7 x 7 classes of offsets, and one for every pair with the class token


def relative_buckets(grid):
    """The relative-position bucket of every pair of tokens, [1+N, 1+N] in 0..49; token 0 is the class token.

    iRPE's product method: the row and the column offset each fall into -3..3 by a piecewise index that is exact for
    near and logarithmic for far patches (alpha 1.9, beta 3.8, gamma 15.2), so one table serves grids of any size.
    Offsets are key minus query, j - i; LoMaR's authors have i - j, which reads the same table mirrored.
    """
    alpha, beta, gamma = 1.9, 3.8, 15.2

    def piecewise(size):
        offset = (torch.arange(size)[None, :] - torch.arange(size)[:, None]).double()
        far = alpha + (offset.abs().clamp(min=1) / alpha).log() / math.log(gamma / alpha) * (beta - alpha)
        return torch.where(offset.abs() <= alpha, offset, offset.sign() * far.round().clamp(max=beta)).long() + 3

    (gh, gw), (rows, columns) = grid, (piecewise(g) for g in grid)
    pairs = rows[:, None, :, None] * 7 + columns[None, :, None, :]
    return F.pad(pairs.reshape(gh * gw, gh * gw), (1, 0, 1, 0), value=NUM_BUCKETS - 1)


class PatchEmbed(nn.Module):
    """Images [B, 3, H, W] -> one linear projection per patch [B, N, D]."""

    def __init__(self, patch_size, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, [B, L, D] -> [B, L, D].

    relative_position: adds q_i . r[bucket(i, j)] to the logits, r a learned table that the heads share: contextual
    relative position encoding on the keys (Wu et al., ICCV 2021, arXiv:2107.14222, product method). forward then
    needs `buckets` [L, L].
    keep: [B, L] bool, the tokens that are attended to; None for all.
    """

    def __init__(self, dim, num_heads, relative_position=False):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"a width of {dim} cannot be split into {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if relative_position:
            self.relative_table = nn.Parameter(torch.zeros(NUM_BUCKETS, dim // num_heads))

    def split_heads(self, x):
        B, L, D = x.shape
        return self.qkv(x).reshape(B, L, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)

    def relative_bias(self, q, buckets):
        """q [B, heads, l, d], buckets [l, L] -> q_i . r[bucket(i, j)], [B, heads, l, L]."""
        products = q @ self.relative_table.to(q.dtype).T
        return products.gather(-1, buckets.expand(*q.shape[:2], -1, -1))

    def forward(self, x, buckets=None, keep=None):
        q, k, v = self.split_heads(x)
        mask = None if keep is None else keep[:, None, None]
        if buckets is not None:
            bias = self.relative_bias(q, buckets)
            mask = bias if keep is None else bias.masked_fill(~mask, -math.inf)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return self.proj(x)

    def weights(self, x, query=slice(None), buckets=None):
        """The attention of the tokens `query`, a slice, to all tokens: [B, heads, l, L], rows sum to one."""
        q, k, _ = self.split_heads(x)
        q = q[:, :, query]
        logits = (q @ k.transpose(-2, -1)).float() / math.sqrt(q.shape[-1])
        if buckets is not None:
            logits = logits + self.relative_bias(q, buckets[query])
        return logits.softmax(-1)


class MLP(nn.Module):
    """Two linear layers with GELU between, [..., D] -> [..., D]."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor per channel, from a small initial value (Touvron et al., ICCV 2021, arXiv:2103.17239)."""

    def __init__(self, dim, init):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x):
        return x * self.gamma


def rescale_projections(blocks):
    """Divides the output projections of block i = 1, 2, ... by sqrt(2 i), as BEiT's code initialises them.

    In CAE's released ViT-B run a later initialisation undoes it, in ViT-L's it stays.
    """
    for i, block in enumerate(blocks, start=1):
        block.attn.proj.weight.data /= math.sqrt(2 * i)
        block.mlp.fc2.weight.data /= math.sqrt(2 * i)


def drop_path_rates(drop_path, depth):
    """The rates of stochastic depth of `depth` blocks, linearly from 0 to drop_path."""
    return [drop_path * i / max(1, depth - 1) for i in range(depth)]


def set_drop_path(blocks, drop_path):
    """Gives a list of blocks stochastic depth, linearly from 0 for the first to `drop_path` for the last."""
    for block, rate in zip(blocks, drop_path_rates(drop_path, len(blocks))):
        block.drop_path = StochasticDepth(rate, "row") if rate else nn.Identity()


class Block(nn.Module):
    """Pre-norm transformer block, [B, L, D] -> [B, L, D]."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0, drop_path=0.0, relative_position=False, layer_scale=None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, relative_position)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.ls1, self.ls2 = (nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale) for _ in range(2))
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path else nn.Identity()

    def forward(self, x, buckets=None, keep=None):
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), buckets, keep)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class CrossAttention(nn.Module):
    """Multi-head attention of q [B, m, D] to k, v [B, n, D] -> [B, m, D], each normed by a norm of its own.

    norm_context: False for keys and values that have been normed already.
    """

    def __init__(self, dim, num_heads, norm_context=True):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"a width of {dim} cannot be split into {num_heads} heads")
        self.num_heads = num_heads
        self.norm_q = nn.LayerNorm(dim, eps=1e-6)
        self.norm_k, self.norm_v = (nn.LayerNorm(dim, eps=1e-6) if norm_context else nn.Identity() for _ in range(2))
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def split_heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, q, k, v):
        q, k, v = self.q(self.norm_q(q)), self.k(self.norm_k(k)), self.v(self.norm_v(v))
        x = F.scaled_dot_product_attention(*(self.split_heads(x) for x in (q, k, v)))
        return self.proj(x.transpose(1, 2).flatten(2))

    def weights(self, q, k):
        """What each q pays to each k: [B, heads, m, n], rows sum to one."""
        q, k = self.split_heads(self.q(self.norm_q(q))), self.split_heads(self.k(self.norm_k(k)))
        return ((q @ k.transpose(-2, -1)).float() / math.sqrt(q.shape[-1])).softmax(-1)


def init_weights(module):
    """Xavier-uniform Linear layers with zero biases; apply with `module.apply(init_weights)`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al., ICLR 2021, arXiv:2010.11929) as MAE sets it up.

    Pre-norm blocks, a class token, a fixed sine-cosine position embedding. Parameter names and shapes are
    those of timm's VisionTransformer, so that weights travel both ways with `strict=True` (with layer_scale to timm's
    init_values=...; with relative_position there is nothing to travel to).

    image_size: pixels, an int or (height, width), divisible by patch_size.
    drop_path: stochastic depth of the last block; it grows linearly from 0 over the blocks.
    relative_position: instead of the position embedding, contextual relative positions in every block (LoMaR's).
    layer_scale: initial value of a learned factor per channel on both branches of every block; the blocks' output
        projections then start smaller too (BEiT, CAE). None: neither.
    """

    def __init__(self, image_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0,
                 drop_path=0.0, relative_position=False, layer_scale=None):
        super().__init__()
        self.num_heads, self.drop_path, self.layer_scale = num_heads, drop_path, layer_scale
        self.image_size, self.patch_size, self.embed_dim = pair(image_size), patch_size, embed_dim
        H, W = self.image_size
        if min(H, W) < 1 or patch_size < 1 or H % patch_size or W % patch_size:
            raise ValueError(f"image_size must be a positive multiple of patch_size={patch_size}, got {H}x{W}")
        self.grid = (H // patch_size, W // patch_size)
        self.num_patches = self.grid[0] * self.grid[1]
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.relative_position = relative_position
        if relative_position:
            self.register_buffer("buckets", relative_buckets(self.grid), persistent=False)
        else:
            self.pos_embed = nn.Parameter(sincos_position_embedding(embed_dim, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList([
            Block(embed_dim, num_heads, mlp_ratio, rate, relative_position, layer_scale)
            for rate in drop_path_rates(drop_path, depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_weights)
        if layer_scale is not None:
            rescale_projections(self.blocks)
        # The patch projection is a Linear layer in disguise: its fan-in is a whole patch.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(embed_dim, -1))
        nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.normal_(self.cls_token, std=0.02)

    def embed(self, images):
        """Images [B, 3, H, W] -> patch embeddings [B, N, D], without positions."""
        if tuple(images.shape[-2:]) != self.image_size:
            raise ValueError("this ViT takes images of {}x{} pixels, got {}x{}".format(
                *self.image_size, *images.shape[-2:]))
        return self.patch_embed(images)

    def sequence(self, tokens, ids=None):
        """Patch embeddings [B, N, D] -> the blocks' input [B, 1+n, D]: positions, choice, class token."""
        x, cls = tokens, self.cls_token
        if not self.relative_position:
            x, cls = x + self.pos_embed[:, 1:], cls + self.pos_embed[:, :1]
        if ids is not None:
            x = take(x, ids)
        return torch.cat([cls.expand(len(x), -1, -1), x.to(cls.dtype)], dim=1)

    def encode(self, tokens, ids=None, buckets=None, keep=None):
        """Patch embeddings [B, N, D] (masked ones may have been replaced) -> latents [B, 1+n, D].

        buckets: with relative positions, those of the patches `ids`, if not all (`relative_buckets`).
        keep: [B, n] bool, which of the patches are attended to; None for all.
        """
        x = self.sequence(tokens, ids)
        if buckets is None and self.relative_position:
            if ids is not None:
                raise ValueError("a ViT with relative positions needs the buckets of the chosen patches")
            buckets = self.buckets
        if keep is not None:
            keep = F.pad(keep, (1, 0), value=True)  # the class token always is
        for block in self.blocks:
            x = block(x, buckets, keep)
        return self.norm(x)

    def forward(self, images, ids=None, keep=None):
        """Images [B, 3, H, W] -> latents [B, 1+n, D] of the class token and the patches `ids` [B, n] (all)."""
        return self.encode(self.embed(images), ids, keep=keep)

    def features(self, images, pool: Literal["cls", "mean"] = "cls"):
        """One vector an image, [B, D], after the last norm: the class token, or the mean of the normed patches (MAE's
        and BEiT's global pooling norms after the mean)."""
        if pool not in ("cls", "mean"):
            raise ValueError(f"pool must be cls or mean, got {pool!r}")
        x = self(images)
        return x[:, 0] if pool == "cls" else x[:, 1:].mean(1)

    def last_attention(self, images, query=0):
        """The last block's attention of one token (0: class token, 1+i: patch i) to the patches: [B, heads, N]."""
        x, buckets = self.sequence(self.embed(images)), self.buckets if self.relative_position else None
        for block in self.blocks[:-1]:
            x = block(x, buckets)
        block = self.blocks[-1]
        return block.attn.weights(block.norm1(x), slice(query, query + 1), buckets)[:, :, 0, 1:]

    def rollout(self, images):
        """Attention rollout: how much of each token [B, 1+N (to), 1+N (from)] reaches each; rows sum to one.

        Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, arXiv:2005.00928: the mean of the
        heads, plus the identity for the residual connection, renormalised, multiplied through the blocks.
        """
        x, buckets = self.sequence(self.embed(images)), self.buckets if self.relative_position else None
        flow = torch.eye(x.shape[1], device=x.device).expand(len(x), -1, -1)
        for block in self.blocks:
            attention = block.attn.weights(block.norm1(x), buckets=buckets).mean(1)
            flow = (attention + torch.eye(x.shape[1], device=x.device)) / 2 @ flow
            x = block(x, buckets)
        return flow


SIZES = {  # embed_dim, depth, num_heads; `nano` is for CPUs and tests, the others are the literature's
    "nano": dict(embed_dim=128, depth=6, num_heads=4),
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16),  # with patch_size=14
}

# ---------------------------------------------------------------------------------------------------------
# Loading weights


def load_file(path):
    """A checkpoint file -> what torch.save wrote, tensors and plain types only; ValueError in one line if it cannot."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the MAE release stores its arguments as one
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # a broken file raises whatever its bytes happen to spell
        reason = f"not a whole PyTorch checkpoint of plain tensors ({type(error).__name__})"
        raise ValueError(f"cannot read {path}: {reason}") from None


def read_checkpoint(source):
    """A checkpoint file, or what it held, -> its plain state dict of tensors.

    Takes this project's checkpoint.pt and encoder.pt, the MAE release's files ({"model": ...}) and timm's state
    dicts. ValueError, in one line, for anything else.
    """
    state = source if isinstance(source, dict) else load_file(source)
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise ValueError("there is no state dict of tensors in it")
    return tensors


def encoder_prefix(state):
    """What stands before the ViT's parameter names in a state dict: "", "encoder.", "base.encoder.", ..."""
    suffix = "patch_embed.proj.weight"
    found = [k.removesuffix(suffix) for k in state if k.endswith(suffix)]
    if not found:
        raise ValueError(f"no Vision Transformer in these weights: no parameter is named {suffix}")
    return found[0]


def grid_of(table, likely=(0, 0)):
    """The (gh, gw) grid that a position table [1, 1+N, D] was made for.

    A sine-cosine table tells; another is taken for square or, if N is no square number, for `likely`.
    """
    N, D = table.shape[1] - 1, table.shape[2]
    for gh in range(1, N + 1):
        if N % gh == 0 and D % 4 == 0:
            if torch.allclose(table.float(), sincos_position_embedding(D, (gh, N // gh)), atol=1e-3):
                return gh, N // gh
    if math.isqrt(N) ** 2 != N and likely[0] * likely[1] == N:
        return likely
    if math.isqrt(N) ** 2 != N:
        raise ValueError(f"a position table of {N} patches, neither sine-cosine nor of a square grid")
    return math.isqrt(N), math.isqrt(N)


def resize_position_embedding(table, grid):
    """Bicubic resizing of a position table [1, 1+N, D] (class token first) to a (gh, gw) grid."""
    patches = table[:, 1:].float().unflatten(1, grid_of(table)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)


def load_weights(module, state, grid, may_miss=()):
    """Loads `state` into `module` and returns (missing, left_over), two lists of names.

    Position tables of another grid are resized to `grid`. Raises ValueError, and loads nothing, if a shape differs, if
    a parameter is missing whose name does not start with one of `may_miss`, or if a block has one too many.
    """
    own = module.state_dict()
    state = dict(state)
    for key in [k for k in own if k.endswith("pos_embed") and k in state]:
        table = state[key]
        if table.ndim == 3 and table.shape[-1] == own[key].shape[-1] and grid_of(table, grid) != grid:
            state[key] = resize_position_embedding(table, grid)
    for key in own:
        if key in state and state[key].shape != own[key].shape:
            raise ValueError(f"{key} is {list(state[key].shape)} in the checkpoint, {list(own[key].shape)} here: "
                             "another model or patch size")
    missing, left_over = [k for k in own if k not in state], [k for k in state if k not in own]
    stacks = {k.split("blocks.")[0] + "blocks." for k in own if "blocks." in k}
    foreign = [k for k in left_over if k.startswith(tuple(stacks))]
    if foreign:
        raise ValueError(f"another architecture: there is no {foreign[0]} here")
    if any(not k.startswith(tuple(may_miss)) for k in missing):
        lacking = [k for k in missing if not k.startswith(tuple(may_miss))]
        raise ValueError(f"the checkpoint lacks {len(lacking)} of {len(own)} parameters, {lacking[0]} first")
    module.load_state_dict({k: state[k] for k in own if k in state}, strict=False)
    return missing, left_over


def load_encoder(encoder, source):
    """Loads a ViT from any checkpoint that `read_checkpoint` takes; returns (missing, left_over) names.

    A missing last norm is allowed: models fine-tuned with mean pooling do without. A decoder or a
    classifier is left over.
    """
    state = read_checkpoint(source)
    prefix = encoder_prefix(state)
    inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    outside = [k for k in state if not k.startswith(prefix)]
    missing, left_over = load_weights(encoder, inside, encoder.grid, may_miss=("norm.",))
    return missing, left_over + outside


def load_mae(mae, source):
    """Loads an MAE with its decoder, from the MAE release's full files or ours; returns (missing, left_over)."""
    state = read_checkpoint(source)
    outer = encoder_prefix(state).removesuffix("encoder.")
    state = {k.removeprefix(outer): v for k, v in state.items()}
    own = ("encoder.", "decoder_", "mask_token")  # the release's encoder has no prefix
    state = {k if k.startswith(own) else f"encoder.{k}": v for k, v in state.items()}
    return load_weights(mae, state, mae.encoder.grid)


def vit_from_checkpoint(source, image_size=None, num_heads=None, drop_path=0.0):
    """Builds the ViT that fits a checkpoint and loads it: (vit, (missing, left_over)).

    All sizes are read off the tensors but the number of heads, which the literature's sizes imply;
    image_size defaults to what the position table was made for.
    """
    state = read_checkpoint(source)
    prefix = encoder_prefix(state)
    embed_dim, _, patch_size, _ = state[prefix + "patch_embed.proj.weight"].shape
    depth = len({k.removeprefix(prefix).split(".")[1] for k in state if k.startswith(prefix + "blocks.")})
    relative = state.get(prefix + "blocks.0.attn.relative_table")
    heads = {(size["embed_dim"], size["depth"]): size["num_heads"] for size in SIZES.values()}
    if relative is not None:
        heads = {(embed_dim, depth): embed_dim // relative.shape[1]}
    num_heads = num_heads or heads.get((embed_dim, depth)) or max(1, embed_dim // 64)
    if image_size is None:
        if prefix + "pos_embed" not in state:
            raise ValueError("give image_size: the checkpoint has no position table to tell it")
        image_size = [g * patch_size for g in grid_of(state[prefix + "pos_embed"])]
    if prefix + "blocks.0.mlp.fc1.weight" not in state:
        raise ValueError("another architecture: no parameter is named blocks.0.mlp.fc1.weight")
    mlp_ratio = state[prefix + "blocks.0.mlp.fc1.weight"].shape[0] / embed_dim
    layer_scale = 0.1 if prefix + "blocks.0.ls1.gamma" in state else None  # its value is loaded
    vit = ViT(image_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, drop_path, relative is not None,
              layer_scale)
    return vit, load_encoder(vit, state)


# ---------------------------------------------------------------------------------------------------------
# Masking: functions of sizes or weights that return index tensors


def count_visible(num_patches, mask_ratio, masked_first=False):
    """int(N * (1 - mask_ratio)), as the MAE release counts, and at least one patch on each side.

    masked_first: N - int(N * mask_ratio), as LoMaR's authors count.
    """
    visible = int(num_patches * (1 - mask_ratio) + 1e-6)  # 100 * (1 - 0.9) is 9.999...
    if masked_first:
        visible = num_patches - int(num_patches * mask_ratio + 1e-6)
    if not 0 < visible < num_patches:
        raise ValueError(f"mask_ratio={mask_ratio} leaves {visible} of {num_patches} patches visible; "
                         "at least one must be visible and one masked")
    return visible


def random_masking(batch, num_patches, mask_ratio, device=None, generator=None):
    """Uniform masking (MAE, §3) -> ids_visible [B, int(N * (1 - mask_ratio))], ids_masked [B, the rest]."""
    visible = count_visible(num_patches, mask_ratio)
    order = torch.rand(batch, num_patches, device=device, generator=generator).argsort(1)
    return order[:, :visible], order[:, visible:]


def units_to_patches(ids, grid, unit_size):
    """Indices [B, n] of units of u*u patches -> [B, n*u*u] indices of their patches on the (gh, gw) grid."""
    gw, u = grid[1], unit_size
    row, column = ids // (gw // u) * u, ids % (gw // u) * u
    inside = torch.arange(u, device=ids.device)
    offsets = (inside[:, None] * gw + inside).flatten()
    return ((row * gw + column).unsqueeze(-1) + offsets).flatten(1)


def unit_masking(batch, grid, unit_size, mask_ratio, device=None, generator=None):
    """Uniform masking of units of u*u patches (SimMIM, §3.2), ceil(units * mask_ratio) of them.

    Returns ids_visible, ids_masked: patch indices [B, n*u*u] on the (gh, gw) grid.
    """
    units = (grid[0] // unit_size) * (grid[1] // unit_size)
    masked = math.ceil(units * mask_ratio - 1e-6)
    if not 0 < masked < units:
        raise ValueError(f"mask_ratio={mask_ratio} masks {masked} of {units} units of {unit_size}x{unit_size} "
                         "patches; at least one must be visible and one masked")
    order = torch.rand(batch, units, device=device, generator=generator).argsort(1)
    ids_masked, ids_visible = order[:, :masked], order[:, masked:]
    return units_to_patches(ids_visible, grid, unit_size), units_to_patches(ids_masked, grid, unit_size)


def window_masking(batch, grid, window_size, num_windows, mask_ratio, device=None, generator=None):
    """Windows of K*K patches at different uniform places, int(K*K * mask_ratio) masked in each (LoMaR, §3.2).

    Returns ids_visible [B, num_windows * n], ids_masked [B, num_windows * m], window after window; windows may overlap.
    """
    (gh, gw), K = grid, window_size
    if not 0 < K <= min(gh, gw):
        raise ValueError(f"a window of window_size={K} does not fit into {gh}x{gw} patches")
    places = (gh - K + 1) * (gw - K + 1)
    if not 0 < num_windows <= places:
        raise ValueError(f"num_windows={num_windows} must be in 1..{places}, the different places of a window of "
                         f"{K}x{K} in {gh}x{gw} patches")
    masked = K * K - count_visible(K * K, mask_ratio, masked_first=True)
    place = torch.rand(batch, places, device=device, generator=generator).argsort(1)[:, :num_windows, None]
    row, column = place // (gw - K + 1), place % (gw - K + 1)
    order = torch.rand(batch, num_windows, K * K, device=device, generator=generator).argsort(2)
    ids = (row + order // K) * gw + column + order % K
    return ids[..., masked:].flatten(1), ids[..., :masked].flatten(1)


def random_blocks(area, grid, min_aspect, generator=None):
    """One rectangle of about `area` [B] patches an image, at a uniform place: [B, gh, gw] float, ones inside.

    height / width is log-uniform in (min_aspect, 1 / min_aspect); a rectangle that the grid cannot hold is left empty.
    """
    (gh, gw), device = grid, area.device
    aspect, top, left = torch.rand(3, len(area), device=device, generator=generator)
    aspect = ((2 * aspect - 1) * math.log(min_aspect)).exp()
    height, width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    height = height * ((height <= gh) & (width <= gw))
    row = torch.arange(gh, device=device) - (top * (gh - height + 1)).floor()[:, None]
    column = torch.arange(gw, device=device) - (left * (gw - width + 1)).floor()[:, None]
    rows = (row >= 0) & (row < height[:, None])
    columns = (column >= 0) & (column < width[:, None])
    return rows.float()[:, :, None] * columns.float()[:, None, :]


def block_masking(batch, grid, num_masked, min_block=16, min_aspect=0.3, device=None, generator=None):
    """Block-wise masking of exactly num_masked patches an image (Bao et al., BEiT, arXiv:2106.08254, Alg. 1).

    Blocks of at least min_block patches, or of what remains to be masked if that is less, may overlap. 30 are proposed
    to each image, of which those are placed that mask something new and no more than remains; what is still missing
    then (about 0.3 patches an image on average in a grid of 24x24) is drawn at random, next to blocks first. A block
    may be as high or as wide as the grid, which BEiT's code excludes.
    Returns ids_visible [B, N - num_masked], ids_masked [B, num_masked].
    """
    num_patches = grid[0] * grid[1]
    if not 0 < num_masked < num_patches:
        raise ValueError(f"num_masked must be in 1..{num_patches - 1} for a {grid[0]}x{grid[1]} grid, got {num_masked}")
    if not (1 <= min_block <= num_patches and 0 < min_aspect <= 1):
        raise ValueError(f"min_block must be in 1..{num_patches} and min_aspect in (0, 1], "
                         f"got {min_block} and {min_aspect}")
    visible = torch.ones(batch, *grid, device=device)
    remaining = torch.full((batch,), float(num_masked), device=device)
    for _ in range(30):  # a fixed number, as asking whether all are done would wait for the GPU
        area = min_block + torch.rand(batch, device=device, generator=generator) * (remaining - min_block)
        new = random_blocks(area, grid, min_aspect, generator) * visible
        added = new.sum((1, 2))
        placed = (added <= remaining).float()
        visible.addcmul_(new, placed[:, None, None], value=-1)
        remaining -= added * placed
    beside = F.max_pool2d(1 - visible, 3, stride=1, padding=1)
    noise = torch.rand(visible.shape, device=device, generator=generator)
    order = (2 * visible - beside + noise).flatten(1).argsort(1)
    return order[:, num_masked:], order[:, :num_masked]


def attention_masking(weights, num_masked, num_thrown, throw="middle", generator=None):
    """Attention-driven masking and throwing (AMT, Eq. 5, 6 and Alg. 1).

    weights: [B, N], not negative; a patch's chance to come early in the order M grows with its weight.
    throw: which part of M is thrown: its "middle" (the paper's choice), its "low" end, or "random" patches,
    which draws the whole order without the weights (Table 4, "MAE+Random T").
    Returns ids_visible, ids_masked, ids_thrown, together all N patches.
    """
    if throw not in ("middle", "low", "random"):
        raise ValueError(f"throw must be middle, low or random, got {throw!r}")
    if throw == "random":
        weights = torch.ones_like(weights)
    # Eq. 5, M = S(P_A): sorting E_i / w_i, E_i exponential, draws by weight without replacement (the smallest
    # of independent Exp(w_i) times is i with chance w_i / sum w). The floor keeps zero weights last, in random order.
    noise = torch.empty_like(weights, dtype=torch.float32).exponential_(generator=generator)
    order = (noise / weights.float().clamp_min(1e-12)).argsort(1)
    ids_masked, rest = order[:, :num_masked], order[:, num_masked:]
    if throw == "low":
        keep = rest.shape[1] - num_thrown
        return rest[:, :keep], ids_masked, rest[:, keep:]
    return rest[:, num_thrown:], ids_masked, rest[:, :num_thrown]


NUM_LABELS = 256  # of one layer of regions


def region_areas(regions):
    """Label maps [B, L, H, W] -> pixels of each label of each layer, [B, L * 256] float; 0 for label 0, nothing."""
    B, L = regions.shape[:2]
    first = NUM_LABELS * torch.arange(L, device=regions.device).view(1, L, 1)
    places = (regions.long().flatten(2) + first).flatten(1)
    areas = torch.zeros(B, L * NUM_LABELS, device=regions.device)
    areas.scatter_add_(1, places, torch.ones((), device=regions.device).expand_as(places))
    areas[:, ::NUM_LABELS] = 0
    return areas


def binary_maps(regions, chosen):
    """The binary maps [B, k, H, W] of the regions `chosen` [B, k], which are 256 * layer + label."""
    layer = (chosen // NUM_LABELS)[..., None, None].expand(-1, -1, *regions.shape[2:])
    return regions.gather(1, layer) == (chosen % NUM_LABELS)[..., None, None]


def select_objects(regions, number, floor=0.05):
    """Different objects drawn uniformly from those that cover at least `floor` of the image (ObjMAE, §3.2, §4.1).

    regions: [B, L, H, W] integer label maps, 0 is nothing. Returns binary maps [B, number, H, W] and whether there was
    such an object, [B, number] bool.
    """
    usable = region_areas(regions) >= floor * regions.shape[2] * regions.shape[3] - 1e-3
    chosen = (torch.rand(usable.shape, device=usable.device) + usable).topk(number, dim=1).indices
    return binary_maps(regions, chosen), usable.gather(1, chosen)


def object_patches(maps, patch_size, share=0.2):
    """Binary maps [B, H, W] -> [B, N] bool, patches with at least `share` of their pixels inside (ObjMAE, §3.2)."""
    return patchify(maps[:, None].float(), patch_size).sum(-1) >= share * patch_size**2 - 1e-3


def keep_patches(member, count, strength=None):
    """At most `count` of the patches `member` [B, N] bool: random ones, or those of largest strength [B, N] >= 0."""
    strength = torch.rand(member.shape, device=member.device) if strength is None else strength
    rank = strength.masked_fill(~member, -1).argsort(1, descending=True).argsort(1)
    return member & (rank < count)


def divide_patches(member, count):
    """Two disjoint random halves of the patches `member` [B, N] bool, each of at most `count` (ObjMAE, §3.3).

    Of an odd number one patch is in neither.
    """
    rank = torch.rand(member.shape, device=member.device).masked_fill(~member, 2).argsort(1).argsort(1)
    half = (member.sum(1, keepdim=True) // 2).clamp(max=count)
    return rank < half, (half <= rank) & (rank < 2 * half)


def align_patches(member, count, alignment, avoid):
    """The patches `member` [B, N] bool, at least one an image, brought to `count` (ObjMAE, §3.3).

    "random" adds patches from elsewhere, none of `avoid` [B, N] bool; the other alignments repeat patches.
    Returns ids [B, count], members first in random order, and which of them are not added, [B, count] bool.
    """
    order = (torch.rand(member.shape, device=member.device) + 2 * ~member + 4 * avoid).argsort(1)
    slot, size = torch.arange(count, device=member.device), member.sum(1, keepdim=True)
    ids = order[:, :count] if alignment == "random" else order.gather(1, slot % size)
    return ids, slot < size


def sample_regions(regions, ids_visible, patch_size, num_regions, generator=None):
    """Draws regions that the visible patches show something of (R-MAE, Appendix A, "Masking strategy").

    regions: label maps [B, L, H, W], uint8 or int64 from 0 to 255. Each layer holds disjoint regions, one a label;
        0 is no region, so that layers can be padded with zeros. A region is a (layer, label) pair.
    ids_visible: the image's mask [B, n], which the regions share.
    Returns bool maps [B, num_regions, H, W]: for each image uniform draws with replacement from its regions with
    at least one pixel inside a visible patch; empty maps if it has none.
    """
    if regions.ndim != 4 or regions.dtype not in (torch.uint8, torch.int64):
        raise ValueError("regions must be label maps [B, L, H, W] of uint8 or int64, "
                         f"got {list(regions.shape)} of {regions.dtype}")
    visible = take(patchify(regions, patch_size), ids_visible).reshape(len(regions), -1, regions.shape[1])
    present = (region_areas(visible.transpose(1, 2)[..., None]) > 0).float()
    present[:, 0] = present.sum(1) == 0  # with no region at all, "nothing" is drawn, which is number 0
    # Drawing just one makes CUDA check `present`, for which the host would wait.
    draws = torch.multinomial(present, max(2, num_regions), replacement=True, generator=generator)
    chosen = draws[:, :num_regions]
    return binary_maps(regions, chosen) & (chosen > 0)[..., None, None]


def crop_maps(maps, box, flip, size):
    """Crops and flips per-image maps as their images were: [B, gh, gw] -> [B, *size].

    box: [B, 4] crop boxes (x1, y1, x2, y2) as fractions of the whole image; flip: [B] bool, horizontal.
    Each output cell is the mean of the bilinearly interpolated map over its part of the box.
    """
    gh, gw = maps.shape[1:]
    x1, y1, x2, y2 = box.to(maps.device, torch.float32).unbind(1)
    rois = torch.stack([torch.arange(len(box), device=maps.device), x1 * gw, y1 * gh, x2 * gw, y2 * gh], dim=1)
    crops = roi_align(maps.float().unsqueeze(1), rois, size, sampling_ratio=4, aligned=True).squeeze(1)
    return torch.where(flip.to(maps.device)[:, None, None], crops.flip(-1), crops)


@torch.no_grad()
def class_activation_map(network, images, labels=None):
    """Class activation maps [B, 1, h, w] at most 1, at the resolution of the last features (ObjMAE, Eq. 2).

    network: a classifier whose last two children are a global average pool and a linear layer, as torchvision's
        ResNets, in eval mode. labels: [B] the classes asked for; default the predicted ones.
    """
    *features, _, head = network.children()
    x = nn.Sequential(*features)(images)
    if labels is None:
        labels = head(x.mean((2, 3))).argmax(1)
    maps = torch.einsum("bchw,bc->bhw", x, head.weight[labels])[:, None]
    return maps / maps.amax((2, 3), keepdim=True).clamp_min(1e-12)


# ---------------------------------------------------------------------------------------------------------
# Losses and pictures


def patch_statistics(patches):
    """Each patch's own mean and sqrt(unbiased variance + 1e-6), [B, n, 1] each (MAE's `norm_pix_loss`)."""
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (var + 1e-6).sqrt()


def pixel_loss(pred, target, norm_pix=False, kind="l2", keep=None):
    """Mean squared ("l2") or absolute ("l1") error of predicted patches [B, n, p*p*3] against true ones.

    norm_pix: the target is each patch minus its mean, over its standard deviation. In float32.
    keep: [B, n] bool, the patches that count; None for all.
    """
    if kind not in ("l1", "l2"):
        raise ValueError(f"kind must be l1 or l2, got {kind!r}")
    pred, target = pred.float(), target.float()
    if norm_pix:
        mean, std = patch_statistics(target)
        target = (target - mean) / std
    error = (F.mse_loss if kind == "l2" else F.l1_loss)(pred, target, reduction="none").mean(-1)
    return error.mean() if keep is None else (error * keep).sum() / keep.sum()


def token_loss(logits, tokens):
    """Mean cross-entropy, in nats, of logits [B, n, V] against tokens [B, n] in 0..V-1. In float32."""
    return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())


def region_loss(pred, target):
    """Binary cross-entropy of logits pred [..., n, p*p] against region patches of 0 and 1, same shape; in float32."""
    return F.binary_cross_entropy_with_logits(pred.float(), target.float())


def reconstruct(images, pred, ids_masked, patch_size, norm_pix=False):
    """The images [B, 3, H, W] with the patches `ids_masked` [B, n] replaced by `pred` [B, n, p*p*3].

    norm_pix: the predictions are of normalised patches; they are put back on the scale of the true ones,
    without which they look like noise.
    """
    patches = patchify(images, patch_size)
    pred = pred.to(patches.dtype)
    if norm_pix:
        mean, std = patch_statistics(take(patches, ids_masked))
        pred = pred * std + mean
    grid = (images.shape[-2] // patch_size, images.shape[-1] // patch_size)
    return unpatchify(put(patches, ids_masked, pred), patch_size, grid)


def split_regions(patches, num_regions):
    """Patches of several maps [B, n, p*p*k], as `patchify` gives them -> [B, k, n, p*p]."""
    return patches.unflatten(-1, (-1, num_regions)).permute(0, 3, 1, 2)


def reconstruct_regions(region_maps, pred, ids_masked, patch_size):
    """Region maps [B, k, H, W] with the patches `ids_masked` [B, n] as probabilities of the logits [B, k, n, p*p]."""
    pred = pred.float().sigmoid().permute(0, 2, 3, 1).flatten(2)
    return reconstruct(region_maps.float(), pred, ids_masked, patch_size)


# ---------------------------------------------------------------------------------------------------------
# Methods


class TargetHead(nn.Linear):
    """The last layer of a method whose targets are a tokenizer's tokens, or pixels if it has none, with the loss.

    Latents [B, n, D] -> pred [B, n, V] or [B, n, p*p*3].

    tokenizer: a module with `vocab_size` and `tokenize(images, grid)` -> tokens [B, N] of the patches in raster order.
    It is no part of the model: neither trained nor saved with it, and it follows the images to their device.
    """

    def __init__(self, encoder, tokenizer=None, norm_pix=True):
        super().__init__(encoder.embed_dim, encoder.patch_size**2 * 3 if tokenizer is None else tokenizer.vocab_size)
        init_weights(self)
        self.grid, self.patch_size, self.norm_pix = encoder.grid, encoder.patch_size, norm_pix
        object.__setattr__(self, "tokenizer", tokenizer)  # nn.Module's own would make it a part

    @torch.no_grad()
    def tokens(self, images):
        """The tokens [B, N] of the patches. In float32, as BEiT's code: bfloat16 would often name another token."""
        with torch.autocast(images.device.type, enabled=False):
            return self.tokenizer.to(images.device).tokenize(images, self.grid)

    def compare(self, pred, images, ids):
        """pred [B, n, ...] of the patches `ids` -> the loss, and dict(loss_pixel) or dict(loss_token, accuracy)."""
        if self.tokenizer is None:
            loss = pixel_loss(pred, take(patchify(images, self.patch_size), ids), self.norm_pix)
            return loss, dict(loss_pixel=loss)
        tokens = self.tokens(images).gather(1, ids)
        loss = token_loss(pred, tokens)
        return loss, dict(loss_token=loss, accuracy=(pred.argmax(-1) == tokens).float().mean())


class MAE(nn.Module):
    """Masked autoencoder. He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv:2111.06377.

    New: the encoder sees only the few visible patches, so that three quarters masked make it fast; a small
    decoder takes their latents and mask tokens and predicts the pixels.

    The order of tokens does not matter to a transformer whose positions are added, so the decoder works on
    [class, visible, masked] as they come, without sorting them back; it takes any two disjoint sets, and
    what is in neither (AMT's thrown patches) costs nothing. Only masked patches go through the last layer.
    Decoder parameters have the release's names.
    """

    inputs = ()  # what forward takes besides the images, from the data's items
    encoder_options = {}  # what the encoder must be made with
    picture = ("image", "masked", "filled")  # the tiles of its picture

    def __init__(self, encoder: ViT, mask_ratio: float = 0.75, decoder_dim: int = 512, decoder_depth: int = 8,
                 decoder_heads: int = 16, norm_pix: bool = True):
        super().__init__()
        count_visible(encoder.num_patches, mask_ratio)
        self.encoder, self.mask_ratio, self.norm_pix = encoder, mask_ratio, norm_pix
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_position_embedding(decoder_dim, encoder.grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList([Block(decoder_dim, decoder_heads) for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, encoder.patch_size**2 * 3)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def decode(self, latents, ids_visible, ids_masked, keep=None):
        """Latents [B, 1 + n_visible, D] -> predicted patches [B, n_masked, p*p*3]; keep: see `Attention`."""
        x = self.decoder_embed(latents)
        x = torch.cat([x, self.mask_token.to(x.dtype).expand(len(x), ids_masked.shape[1], -1)], dim=1)
        positions = F.pad(torch.cat([ids_visible, ids_masked], dim=1) + 1, (1, 0))  # row 0 is the class token's
        x = x + F.embedding(positions, self.decoder_pos_embed[0])
        for block in self.decoder_blocks:
            x = block(x, keep=keep)
        return self.decoder_pred(self.decoder_norm(x[:, -ids_masked.shape[1] :]))

    def forward(self, images, ids_visible=None, ids_masked=None):
        """images [B, 3, H, W], and optionally the mask to replay -> loss, pred, ids_visible, ids_masked."""
        if ids_visible is None:
            ids_visible, ids_masked = random_masking(
                len(images), self.encoder.num_patches, self.mask_ratio, images.device)
        latents = self.encoder(images, ids_visible)
        pred = self.decode(latents, ids_visible, ids_masked)
        target = take(patchify(images, self.encoder.patch_size), ids_masked)
        loss = pixel_loss(pred, target, self.norm_pix)
        return dict(loss=loss, pred=pred, ids_visible=ids_visible, ids_masked=ids_masked)


class SimMIM(nn.Module):
    """Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", CVPR 2022, arXiv:2111.09886.

    New: no decoder at all. The encoder sees every patch, masked ones as a learned token, masks come in units
    larger than a patch, and one linear layer predicts raw pixels under an l1 loss.

    unit_size: side of a masking unit in patches; 2 is the paper's 32 pixels at patch size 16.
    encoder: the released ViT-B has drop path 0.1 and layer scale 0.1.
    Departs from the released run in its position embedding, which is the sine-cosine table here (there relative
    positions that the blocks share), and in a cosine schedule (there the rate falls tenfold at epoch 700). Both
    start from smaller output projections: see `rescale_projections`.
    """

    inputs = ()
    encoder_options = dict(drop_path=0.1, layer_scale=0.1)
    picture = ("image", "masked", "filled")
    norm_pix = False

    def __init__(self, encoder: ViT, mask_ratio: float = 0.6, unit_size: int = 2):
        super().__init__()
        if unit_size < 1 or any(g % unit_size for g in encoder.grid):
            raise ValueError("unit_size={} must divide the grid of {}x{} patches".format(unit_size, *encoder.grid))
        self.encoder, self.mask_ratio, self.unit_size = encoder, mask_ratio, unit_size
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.embed_dim))
        self.head = nn.Linear(encoder.embed_dim, encoder.patch_size**2 * 3)
        self.head.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)
        unit_masking(1, encoder.grid, unit_size, mask_ratio)  # says at once if the ratio masks nothing or all

    def forward(self, images, ids_visible=None, ids_masked=None):
        """images [B, 3, H, W], and optionally the mask to replay -> loss, pred, ids_visible, ids_masked.

        Patches in neither index tensor (AMT's thrown ones) do not enter the encoder.
        """
        if ids_visible is None:
            ids_visible, ids_masked = unit_masking(
                len(images), self.encoder.grid, self.unit_size, self.mask_ratio, images.device)
        tokens = put(self.encoder.embed(images), ids_masked, self.mask_token)
        latents = self.encoder.encode(tokens, torch.cat([ids_visible, ids_masked], dim=1))
        pred = self.head(latents[:, -ids_masked.shape[1] :])
        target = take(patchify(images, self.encoder.patch_size), ids_masked)
        loss = pixel_loss(pred, target, kind="l1")
        return dict(loss=loss, pred=pred, ids_visible=ids_visible, ids_masked=ids_masked)


class BEiT(nn.Module):
    """Bao, Dong, Piao, Wei, "BEiT: BERT Pre-Training of Image Transformers", ICLR 2022, arXiv:2106.08254.

    New: what is predicted is not pixels but the discrete token that a tokenizer gives a patch. As in BERT, the encoder
    sees every patch, masked ones as a learned token, and one linear layer classifies; masks come in blocks.

    tokenizer: see `TargetHead`; ValueError without one.
    encoder: the paper's has layer scale 0.1 (ViT-L: 1e-5). Departs from it in the position embedding, which is the
        sine-cosine table here.
    """

    inputs = ()
    encoder_options = dict(drop_path=0.1, layer_scale=0.1)
    picture = ("image", "masked", "filled")

    def __init__(self, encoder: ViT, tokenizer=None, mask_ratio: float = 75 / 196, min_block: int = 16):
        super().__init__()
        if tokenizer is None:
            raise ValueError("BEiT predicts tokens and needs a tokenizer")
        self.num_masked = encoder.num_patches - count_visible(encoder.num_patches, mask_ratio, masked_first=True)
        self.encoder, self.min_block = encoder, min(min_block, self.num_masked)
        block_masking(1, encoder.grid, self.num_masked, self.min_block)  # says at once what is wrong
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.embed_dim))
        self.head = TargetHead(encoder, tokenizer)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images, ids_visible=None, ids_masked=None):
        """images [B, 3, H, W], and optionally the mask to replay -> loss, accuracy, pred, ids_visible, ids_masked."""
        if ids_visible is None:
            ids_visible, ids_masked = block_masking(
                len(images), self.encoder.grid, self.num_masked, self.min_block, device=images.device)
        tokens = put(self.encoder.embed(images), ids_masked, self.mask_token)
        pred = self.head(take(self.encoder.encode(tokens)[:, 1:], ids_masked))
        loss, parts = self.head.compare(pred, images, ids_masked)
        return dict(loss=loss, **parts, pred=pred, ids_visible=ids_visible, ids_masked=ids_masked)


class AMT(nn.Module):
    """Attention-driven masking and throwing. Liu, Gui, Luo, "Good helper is around you: Attention-driven Masked Image
    Modeling", AAAI 2023, arXiv:2211.15362.

    New: the model's own class attention says where the object is; highly attended patches are more likely to be
    masked, and a middle part of the order is thrown: it enters neither encoder, decoder nor loss. A masking
    strategy over MAE or SimMIM, whose class does all the rest.

    base: "mae" or "simmim"; further keyword arguments go to that class.
    mask_ratio, throw_ratio: default to §4.1: 0.45 / 0.40 on MAE, 0.44 / 0.26 on SimMIM. With throw_ratio=0
        alone, mask_ratio is the base's own: attention-driven masking without throwing (Table 1).
    throw: "middle", "low" or "random" (Table 4): see `attention_masking`. "random" needs no maps at all.
    interval: epochs between updates of the maps; default 40, or in shorter runs 10% (MAE) and 20% (SimMIM) of them, at
        least 2, as an update costs up to an epoch's time.

    Training: masks are random (the base's own) until `update_maps` has filled `maps`, one map of the whole image
    for each training image; forward(images, index, box, flip) cuts from them what the augmentation cut from the
    image. Without `index` the maps are computed from the images on the spot, at the cost of one more forward.
    Departs from the paper as its authors' code does: every head is scaled to [0, 1] before the mean (§3.2 scales
    the mean once). Departs from that code as the paper says: it crops its maps at the wrong place (always near one
    corner, by 2x2 to 3x3 cells, which has nothing to do with the image's crop), so the published figures come from
    other masks than the paper's; it renews the maps one epoch later; and on MAE it throws int(0.85 N) - int(0.45 N)
    patches, here int(0.40 N).
    """

    inputs = ("index", "box", "flip")
    encoder_options = {}
    picture = ("image", "masked", "filled")

    def __init__(self, encoder: ViT, base: Literal["mae", "simmim"] = "mae", mask_ratio: float | None = None,
                 throw_ratio: float | None = None, throw: Literal["middle", "low", "random"] = "middle",
                 interval: int | None = None, **base_options):
        super().__init__()
        if base not in AMT_BASES or throw not in ("middle", "low", "random"):
            raise ValueError(f"base must be mae or simmim and throw middle, low or random, got {base!r} and {throw!r}")
        self.base = AMT_BASES[base](encoder, **base_options)
        self.norm_pix, self.throw, self.interval = self.base.norm_pix, throw, interval
        if mask_ratio is None:
            mask_ratio = self.base.mask_ratio if throw_ratio == 0 else {"mae": 0.45, "simmim": 0.44}[base]  # §4.1
        if throw_ratio is None:
            throw_ratio = {"mae": 0.40, "simmim": 0.26}[base]  # §4.1
        self.interval_fraction = {"mae": 0.1, "simmim": 0.2}[base]  # §4.1
        if interval is not None and interval < 1:
            raise ValueError(f"interval must be at least 1 epoch, got {interval}")
        # SimMIM masks units of patches, and counts them upwards; MAE masks patches, and counts downwards.
        self.unit_size = self.base.unit_size if base == "simmim" else 1
        self.unit_grid = tuple(g // self.unit_size for g in encoder.grid)
        units = self.unit_grid[0] * self.unit_grid[1]
        count = (lambda x: math.ceil(x - 1e-6)) if base == "simmim" else (lambda x: int(x + 1e-6))
        self.num_masked, self.num_thrown = count(units * mask_ratio), count(units * throw_ratio)
        if self.num_masked < 1 or self.num_thrown < 0 or self.num_masked + self.num_thrown >= units:
            raise ValueError(f"mask_ratio={mask_ratio} and throw_ratio={throw_ratio} must mask at least one and leave "
                             f"at least one visible of {units}, got {self.num_masked} masked, {self.num_thrown} thrown")
        self.register_buffer("maps", None, persistent=False)  # float16 [n_images, gh, gw], None in the first interval

    @property
    def encoder(self):
        return self.base.encoder

    @torch.no_grad()
    def attention_map(self, images):
        """Whole images [B, 3, H, W] -> maps [B, gh, gw] in [0, 1] (Eq. 3, 4), without dropout or gradient."""
        training = self.encoder.training
        self.encoder.eval()
        attention = self.encoder.last_attention(images)  # Eq. 3, the class token's row
        self.encoder.train(training)
        low, high = attention.aminmax(dim=-1, keepdim=True)
        attention = (attention - low) / (high - low).clamp_min(1e-12)
        return attention.mean(1).unflatten(1, self.encoder.grid)  # Eq. 4

    def maps_due(self, epoch, epochs):
        """Whether the maps are to be (re)computed before this epoch (0-based): every interval, not at the first."""
        if self.throw == "random":
            return False
        interval = self.interval or min(40, max(2, round(self.interval_fraction * epochs)))  # §4.1
        return epoch > 0 and epoch % interval == 0

    @torch.no_grad()
    def update_maps(self, batches, num_images):
        """Recomputes the maps from (whole images [B, 3, H, W], index [B]) batches of all `num_images` images.

        Under torch.distributed each process brings its share, and all end with all of them.
        """
        maps = torch.zeros(num_images, *self.encoder.grid, dtype=torch.float16, device=self.encoder.cls_token.device)
        for images, index in batches:
            maps[index] = self.attention_map(images).half()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(maps, op=dist.ReduceOp.MAX)  # what a process did not compute is zero there
        self.maps = maps

    def draw(self, weights):
        """Weights P_A [B, gh, gw] per unit -> ids_visible, ids_masked, ids_thrown, in patches (Eq. 5, 6)."""
        ids = attention_masking(weights.flatten(1), self.num_masked, self.num_thrown, self.throw)
        return [units_to_patches(i, self.encoder.grid, self.unit_size) for i in ids]

    def forward(self, images, index=None, box=None, flip=None, ids_visible=None, ids_masked=None):
        """images [B, 3, H, W] -> the base's loss, pred, ids_visible, ids_masked, and ids_thrown.

        index [B]: each image's number among the training images; with it box [B, 4], flip [B]: see `crop_maps`.
        ids_visible, ids_masked: a mask to replay.
        """
        if index is not None and (box is None or flip is None):
            raise ValueError("index needs box and flip, to cut the maps as the images were cut")
        ids_thrown = None
        if ids_visible is None and self.throw == "random":
            weights = torch.ones(len(images), *self.unit_grid, device=images.device)
            ids_visible, ids_masked, ids_thrown = self.draw(weights)
        elif ids_visible is None and index is None:
            whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(images), -1)
            unflipped = torch.zeros(len(images), dtype=torch.bool)
            weights = crop_maps(self.attention_map(images), whole, unflipped, self.unit_grid)
            ids_visible, ids_masked, ids_thrown = self.draw(weights)
        elif ids_visible is None and self.maps is not None:
            weights = crop_maps(self.maps[index], box, flip, self.unit_grid)
            ids_visible, ids_masked, ids_thrown = self.draw(weights)
        out = self.base(images, ids_visible, ids_masked)
        if ids_thrown is None:
            ids_thrown = out["ids_masked"][:, :0]
        return dict(out, ids_thrown=ids_thrown)


AMT_BASES = {"mae": MAE, "simmim": SimMIM}


class LoMaR(nn.Module):
    """Local masked reconstruction. Chen, Hu, Li, Elhoseiny, "Efficient Self-supervised Vision Pretraining with Local
    Masked Reconstruction", 2022, arXiv:2206.00790.

    New: an image is reconstructed inside a few small windows, each a sequence of its own, so the cost does not grow
    with the image; one encoder sees visible and masked patches, and relative positions make all places alike.

    encoder: a ViT with relative_position=True.
    tokenizer: see `TargetHead`; with one the target is its tokens, LoMaR on BEiT (§4.2; there with BEiT's settings, for
        300 epochs).
    num_windows: defaults to as many as hold the patches of a 14x14 grid (or of a smaller one, whole), which is Table 4:
        8 of 5x5, 4 of 7x7, 3 of 9x9; and for images of 384 and 448 pixels to §4.1's 6 and 9 of 7x7.

    Departs from the authors' code, and follows the paper, in that each image has windows at different places of its
    own (there the places are shared by the batch, and may repeat) and that crops are not mirrored. "Zero
    out" (§3.2) is a learned mask token, and the "MLP head" one linear layer, as in that code.
    """

    inputs = ()
    encoder_options = dict(relative_position=True)
    picture = ("image", "region", "masked", "filled")  # its Figure 7

    def __init__(self, encoder: ViT, tokenizer=None, mask_ratio: float = 0.8, window_size: int = 7,
                 num_windows: int | None = None, norm_pix: bool = True):
        super().__init__()
        if not encoder.relative_position:
            raise ValueError("LoMaR needs an encoder with relative positions: ViT(..., relative_position=True)")
        if num_windows is None:
            at_size = {(384, 384): 6, (448, 448): 9}.get(encoder.image_size) if window_size == 7 else None  # §4.1
            num_windows = at_size or math.ceil(min(encoder.num_patches, 196) / max(1, window_size) ** 2)  # Table 4
        ids_visible, _ = window_masking(1, encoder.grid, window_size, num_windows, mask_ratio)  # or says what is wrong
        self.encoder, self.mask_ratio, self.norm_pix = encoder, mask_ratio, norm_pix
        self.window_size, self.num_windows = window_size, num_windows
        self.num_visible = ids_visible.shape[1] // num_windows  # of each window
        self.num_masked = window_size**2 - self.num_visible
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.embed_dim))
        self.head = TargetHead(encoder, tokenizer, norm_pix)
        nn.init.normal_(self.mask_token, std=0.02)
        self.register_buffer("buckets", relative_buckets((window_size, window_size)), persistent=False)

    def forward(self, images, ids_visible=None, ids_masked=None):
        """images [B, 3, H, W], and optionally the windows to replay -> loss, pred, ids_visible, ids_masked.

        The index tensors are `window_masking`'s: W windows after one another, in all [B, W * n] and [B, W * m].
        """
        if ids_visible is None:
            ids_visible, ids_masked = window_masking(
                len(images), self.encoder.grid, self.window_size, self.num_windows, self.mask_ratio, images.device)
        # A window is a sequence of its own, [B*W, K*K], its patches in raster order as §3.2 feeds them.
        ids = torch.cat([ids_visible.reshape(-1, self.num_visible), ids_masked.reshape(-1, self.num_masked)], dim=1)
        ids_window, order = ids.sort(1)
        masked = order.argsort(1)[:, self.num_visible :]  # where in the window the masked patches lie
        tokens = take(self.encoder.embed(images), ids_window.view(len(images), -1))
        tokens = put(tokens.reshape(*ids_window.shape, -1), masked, self.mask_token)
        latents = self.encoder.encode(tokens, buckets=self.buckets)
        pred = self.head(take(latents[:, 1:], masked)).reshape(*ids_masked.shape, -1)
        loss, parts = self.head.compare(pred, images, ids_masked)
        return dict(loss=loss, **parts, pred=pred, ids_visible=ids_visible, ids_masked=ids_masked)


class ObjMAE(MAE):
    """Object-wise masked autoencoder. Wu, Mo, "Object-wise Masked Autoencoders for Fast Pre-training", 2022,
    arXiv:2205.14338.

    New: one object of the image is drawn; half of its patches are the encoder's (source), half are predicted (target),
    and all else of the image enters nothing, which leaves a fraction of the cost and no context but the object's own.
    MAE with mask_ratio=0.5 is the case alpha=0.5 with the whole image as the object.

    alpha: length of source and of target, each, as a share of all patches: 0.25 on ImageNet (Table 4), 0.17 on COCO
        (Table 9; half of the 0.34 that §4.1 gives).
    alignment: how regions of different size get this length (§3.3): "throwout" cuts all to the batch's smallest,
        "zero" pads with tokens that take part in nothing, "replicate" repeats patches, "random" adds other patches.
    selection: "intra", or "inter" (§4.5): source from one object, target from another, or from the background.
    object_floor: smallest object, as a share of the image. patch_share: of a patch's pixels that make it the object's.

    Of a class activation map the patches above 0.3 (Appendix A) are the object, cut to the 2 * alpha * N of strongest
    response (§4.3). An image without a usable object is taken for one object. The class token, which the paper does not
    mention, stays as in MAE.
    """

    inputs = ("regions",)
    picture = ("image", "region", "source", "target", "filled")  # Figures 4 and 8

    def __init__(self, encoder: ViT, alpha: float = 0.25, alignment: Literal["throwout", "zero", "replicate",
                 "random"] = "zero", selection: Literal["intra", "inter"] = "intra", object_floor: float = 0.05,
                 patch_share: float = 0.2, decoder_dim: int = 192, decoder_depth: int = 4, decoder_heads: int = 3,
                 norm_pix: bool = False):
        super().__init__(encoder, 0.5, decoder_dim, decoder_depth, decoder_heads, norm_pix)  # Table 1
        self.count = int(alpha * encoder.num_patches + 1e-6)
        if not 1 <= self.count <= encoder.num_patches // 2:
            raise ValueError(f"alpha={alpha} makes source and target {self.count} patches each; it may be "
                             f"1 to {encoder.num_patches // 2} of {encoder.num_patches}")
        if alignment not in ("throwout", "zero", "replicate", "random") or selection not in ("intra", "inter"):
            raise ValueError("alignment must be throwout, zero, replicate or random and selection intra or inter, got "
                             f"{alignment!r} and {selection!r}")
        if not (0 <= object_floor < 1 and 0 < patch_share <= 1):
            raise ValueError(f"object_floor={object_floor} must be in [0, 1) and patch_share={patch_share} in (0, 1]")
        self.alignment, self.selection = alignment, selection
        self.object_floor, self.patch_share = object_floor, patch_share

    def select(self, regions, batch):
        """The patches of two objects, [B, N] bool each; the second may be the first's background, or nothing."""
        whole = torch.ones(batch, self.encoder.num_patches, dtype=torch.bool, device=self.mask_token.device)
        if regions is None:
            return whole, ~whole
        p, share = self.encoder.patch_size, self.patch_share
        if regions.is_floating_point():  # responses of a class activation map: the strongest patches (§4.3)
            first = object_patches(regions[:, 0] > 0.3, p, share)  # Appendix A
            first = keep_patches(first, 2 * self.count, patchify(regions[:, :1].clamp_min(0), p).mean(-1))
            return first, ~first
        maps, found = select_objects(regions, 2, self.object_floor)
        first = object_patches(maps[:, 0], p, share) & found[:, :1]
        second = object_patches(maps[:, 1], p, share)
        return first, torch.where(found[:, 1:], second, True) & ~first

    def split(self, regions, batch):
        """Index tensors and validity of source and target: ids_visible, ids_masked, keep_visible, keep_masked."""
        first, second = self.select(regions, batch)
        if self.selection == "intra":
            lost = first.sum(1, keepdim=True) < 2
            source, target = divide_patches(first | lost, self.count)
        else:
            lost = ~(first.any(1, keepdim=True) & second.any(1, keepdim=True))
            halves = divide_patches(torch.ones_like(first), self.count)
            first, second = (torch.where(lost, half, x) for x, half in zip((first, second), halves))
            source, target = keep_patches(first, self.count), keep_patches(second, self.count)
        count = self.count
        if self.alignment == "throwout":
            count = int(torch.minimum(source.sum(1), target.sum(1)).min())  # waits for the device: it is a shape
        ids_visible, keep_visible = align_patches(source, count, self.alignment, avoid=target)
        chosen = torch.zeros_like(source).scatter(1, ids_visible, True)
        ids_masked, keep_masked = align_patches(target, count, self.alignment, avoid=chosen)
        if self.alignment != "zero":
            keep_visible = keep_masked = None
        return ids_visible, ids_masked, keep_visible, keep_masked

    def forward(self, images, regions=None, ids_visible=None, ids_masked=None, keep_visible=None, keep_masked=None):
        """images [B, 3, H, W] -> loss, pred, ids_visible, ids_masked, and with zero padding keep_visible, keep_masked.

        regions: integer label maps [B, L, H, W], 0 for no object; or class activation maps [B, 1, H, W], floats with
            maximum 1 (`class_activation_map`); None for the whole image as one object.
        The other arguments replay a mask; keep_*: [B, n] bool, False for padding.
        """
        if ids_visible is None:
            ids_visible, ids_masked, keep_visible, keep_masked = self.split(regions, len(images))
        keep = None
        if keep_visible is not None:
            keep = F.pad(torch.cat([keep_visible, keep_masked], dim=1), (1, 0), value=True)
        latents = self.encoder(images, ids_visible, keep_visible)
        pred = self.decode(latents, ids_visible, ids_masked, keep)
        target = take(patchify(images, self.encoder.patch_size), ids_masked)  # gathered, not unshuffled (§3.4)
        loss = pixel_loss(pred, target, self.norm_pix, keep=keep_masked)
        return dict(loss=loss, pred=pred, ids_visible=ids_visible, ids_masked=ids_masked, keep_visible=keep_visible,
                    keep_masked=keep_masked)


class CrossBlock(nn.Module):
    """Self-attention, cross-attention to a context [B, n, D], MLP: [B, m, D] -> [B, m, D], pre-norm as `Block`.

    The context is taken as it is: R-MAE's neck has normed it already.
    """

    def __init__(self, dim, num_heads, mlp_ratio=4.0):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attn = Attention(dim, num_heads)
        self.cross_attn = CrossAttention(dim, num_heads, norm_context=False)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x, context):
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(x, context, context)
        return x + self.mlp(self.norm2(x))


class RegionBranch(nn.Module):
    """R-MAE's region encoder, neck and region decoder, all `dim` wide, in the three variants of Appendix A; see `RMAE`.

    In between, the k maps of an image are R sequences: R = k, or 1 in the channel variant, which makes them one image
    of k channels. from_pixels: whether the neck gets the pixel encoder's output, or nothing but mask tokens.
    """

    def __init__(self, encoder, num_regions, variant, from_pixels, dim, num_heads, depth):
        super().__init__()
        if variant not in ("length", "channel", "batch"):
            raise ValueError(f"variant must be length, channel or batch, got {variant!r}")
        if num_regions < 1 or depth < 1:
            raise ValueError(f"num_regions={num_regions} and region_decoder_depth={depth} must be at least 1")
        self.patch_size, self.variant, self.num_regions = encoder.patch_size, variant, num_regions
        patch_dim = encoder.patch_size**2 * (num_regions if variant == "channel" else 1)
        self.embed = nn.Linear(patch_dim, dim)
        self.pos_embed = nn.Parameter(sincos_position_embedding(dim, encoder.grid), requires_grad=False)
        self.block, self.block_norm = Block(dim, num_heads), nn.LayerNorm(dim, eps=1e-6)
        self.proj = nn.Linear(dim, dim)  # f of Eq. 2, 5, 10
        self.neck_embed = nn.Linear(encoder.embed_dim, dim) if from_pixels else None
        self.neck_mask_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        if variant == "length":
            self.neck_block, self.neck_norm = Block(dim, num_heads), nn.LayerNorm(dim, eps=1e-6)
            self.blocks = nn.ModuleList([CrossBlock(dim, num_heads) for _ in range(depth - 1)])
            self.last_norm, self.last_attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, num_heads)
            self.expand = nn.Linear(dim, dim)  # W of Eq. 11
        else:
            self.mask_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
            self.blocks = nn.ModuleList([Block(dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, patch_dim))
        self.apply(init_weights)

    def encode(self, region_maps, ids_visible):
        """Maps [B, k, H, W] -> embeddings of their visible patches [B, R, n, dim], not yet pooled or normed (Eq. 1, 4,
        7)."""
        k = region_maps.shape[1]
        patches = take(patchify(region_maps, self.patch_size), ids_visible)
        if self.variant == "channel" and k != self.num_regions:
            raise ValueError(f"the channel variant was built for num_regions={self.num_regions} maps, got {k}")
        patches = patches.unsqueeze(1) if self.variant == "channel" else split_regions(patches, k)
        x = self.embed(patches.to(self.embed.weight.dtype) - 0.5)
        x = x + F.embedding(ids_visible + 1, self.pos_embed[0]).unsqueeze(1)
        return self.block(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def context(self, latents, ids_image):
        """The pixel encoder's output [B, 1 + n, D] -> v'_penc [B, 1 + N, dim]: mask tokens filled in, positions."""
        x = self.neck_mask_token.expand(len(latents), self.pos_embed.shape[1], -1)
        if self.neck_embed is not None:
            x = put(x, F.pad(ids_image + 1, (1, 0)), self.neck_embed(latents))
        return x + self.pos_embed

    def decode(self, embeddings, latents, ids_visible, ids_masked, ids_image):
        """Embeddings [B, R, n, dim] of the regions, latents of the image -> logits [B, k, n_masked, p*p].

        ids_image: the patches that the latents are of; in pre-training those of the regions, ids_visible.
        """
        R, context = embeddings.shape[1], self.context(latents, ids_image)
        if self.variant == "length":
            context = self.neck_norm(self.neck_block(context))  # Eq. 9
            # Eq. 7, 8; the authors' code norms the mean, not each patch.
            queries = self.proj(self.block_norm(embeddings.mean(2)))
            for block in self.blocks:
                queries = block(queries, context)  # Eq. 10
            queries = queries + self.last_attn(self.last_norm(queries))
            # Eq. 11. What follows works on each position alone, so the masked ones are enough.
            x = self.expand(take(context[:, 1:], ids_masked)).unsqueeze(1) + queries.unsqueeze(2)
        else:
            ids_visible, ids_masked, context = (x.repeat_interleave(R, 0) for x in (ids_visible, ids_masked, context))
            x = put(self.mask_token.expand_as(context), ids_visible + 1, self.proj(self.block_norm(embeddings)).flatten(0, 1))
            x = x + context  # v'_renc of Eq. 2, 5 and v'_penc
            for block in self.blocks:  # Eq. 3, 6
                x = block(x)
            x = take(x[:, 1:], ids_masked).unflatten(0, (-1, R))
        logits = self.head(self.norm(x))
        return split_regions(logits.squeeze(1), self.num_regions) if self.variant == "channel" else logits


class RMAE(MAE):
    """Region-aware masked autoencoder. Nguyen, Aggarwal, Li, Oswald, Kirillov, Snoek, Chen, "R-MAE: Regions Meet Masked
    Autoencoders", ICLR 2024, arXiv:2306.05411.

    New: beside MAE's pixels, the binary maps of a few regions of the image are masked and completed. A region's visible
    patches are pooled into one query; added to the image's features at every place, it unfolds into the whole map
    (the length variant), so that more regions cost next to nothing and their order does not matter.

    variant: "length"; "batch", each region a sequence of its own; or "channel", the regions one image of k channels.
    cross_feed: whether the pixels help to complete the regions, the regions the pixels (Eq. 12-14), or "both".

    Where the paper is silent: maps enter as -0.5 and 0.5; a norm ends the region encoder (in the length variant behind
    the mean, as in the authors' code) and the neck; the class token goes along through neck and decoder, as in MAE's; the last block of the length variant has no
    MLP but the predictor, whose layers have GELU between; neither the batch nor the channel variant has a block in the
    neck; with region_to_pixel the neck gets mask tokens alone. Departs from it in that p_E = p_D = region_dim, and in
    that h (Eq. 12) is added before MAE's linear decoder_embed, not after, and without a second [mask] token, which
    comes to the same function. The authors' released configuration has 8 blocks in the neck, draws regions without
    replacement where an image has eight, and warms up for 8% of the epochs on COCO; here as in the paper.
    """

    inputs = ("regions",)
    picture = ("masked", "filled", "image", "region_masked", "region_filled", "region_true")  # Figure 5

    def __init__(self, encoder: ViT, mask_ratio: float = 0.75, num_regions: int = 8,
                 variant: Literal["length", "channel", "batch"] = "length",
                 cross_feed: Literal["pixel_to_region", "region_to_pixel", "both"] = "pixel_to_region",
                 region_dim: int = 128, region_heads: int = 8, region_decoder_depth: int = 1,
                 decoder_dim: int = 512, decoder_depth: int = 8, decoder_heads: int = 16, norm_pix: bool = True):
        super().__init__(encoder, mask_ratio, decoder_dim, decoder_depth, decoder_heads, norm_pix)
        if cross_feed not in ("pixel_to_region", "region_to_pixel", "both"):
            raise ValueError(f"cross_feed must be pixel_to_region, region_to_pixel or both, got {cross_feed!r}")
        self.num_regions = num_regions
        self.region_branch = RegionBranch(encoder, num_regions, variant, cross_feed != "region_to_pixel", region_dim,
                                          region_heads, region_decoder_depth)
        self.region_feed = None
        if cross_feed != "pixel_to_region":
            self.region_feed = nn.Linear(region_dim, encoder.embed_dim)  # h of Eq. 12
            self.region_feed.apply(init_weights)

    def pixel_part(self, images, latents, embeddings, ids_visible, ids_masked):
        """The pixel branch: latents [B, 1 + n, D], region embeddings [B, R, n, dim] -> dict(loss_pixel, pred)."""
        if self.region_feed is not None:
            embeddings = self.region_branch.block_norm(embeddings)
            latents = latents + F.pad(self.region_feed(embeddings.mean(1)), (0, 0, 1, 0))  # Eq. 12-14
        pred = self.decode(latents, ids_visible, ids_masked)
        target = take(patchify(images, self.encoder.patch_size), ids_masked)
        return dict(loss_pixel=pixel_loss(pred, target, self.norm_pix), pred=pred)

    def forward(self, images, regions=None, ids_visible=None, ids_masked=None, region_maps=None):
        """images [B, 3, H, W], regions [B, L, H, W] (see `sample_regions`) -> loss, its parts loss_pixel and
        loss_region, pred, pred_regions [B, k, n_masked, p*p] (logits), region_maps, ids_visible, ids_masked.

        To replay: ids_visible, ids_masked, a mask; region_maps, the k binary maps [B, k, H, W] to take for regions.
        """
        given = regions if region_maps is None else region_maps
        if given is None or given.ndim != 4 or given.shape[-2:] != images.shape[-2:]:
            raise ValueError("needs regions, label maps [B, L, H, W], or region_maps, binary ones [B, k, H, W], as "
                             f"large as the images, got {None if given is None else list(given.shape)}")
        p = self.encoder.patch_size
        if ids_visible is None:
            ids_visible, ids_masked = random_masking(
                len(images), self.encoder.num_patches, self.mask_ratio, images.device)
        if region_maps is None:
            region_maps = sample_regions(regions, ids_visible, p, self.num_regions)
        latents = self.encoder(images, ids_visible)
        embeddings = self.region_branch.encode(region_maps, ids_visible)
        pred_regions = self.region_branch.decode(embeddings, latents, ids_visible, ids_masked, ids_visible)
        target = split_regions(take(patchify(region_maps, p), ids_masked), region_maps.shape[1])
        loss_region = region_loss(pred_regions, target)
        parts = self.pixel_part(images, latents, embeddings, ids_visible, ids_masked)
        loss = loss_region + parts.get("loss_pixel", 0.0)  # with equal weight, §3.2
        return dict(loss=loss, **parts, loss_region=loss_region, pred_regions=pred_regions, region_maps=region_maps,
                    ids_visible=ids_visible, ids_masked=ids_masked)

    @torch.no_grad()
    def complete(self, images, hints, ids_visible, ids_image=None):
        """Interactive segmentation (Figure 6): hints, binary maps [B, k, H, W] -> probabilities [B, k, H, W].

        Of the hints only the patches ids_visible [B, n] are read, and returned as they are; of the images [B, 3, H, W]
        the patches ids_image, which default to the same, as in pre-training (Figure 6 gives the image whole).
        """
        ids_image, k = ids_visible if ids_image is None else ids_image, hints.shape[1]
        if self.region_branch.variant == "channel":  # made for num_regions channels, which the hints fill in turn
            if k > self.num_regions:
                raise ValueError(f"the channel variant was built for num_regions={self.num_regions} maps, got {k}")
            hints = hints[:, torch.arange(self.num_regions, device=hints.device) % k]
        visible = torch.zeros(len(images), self.encoder.num_patches, device=images.device).scatter(1, ids_visible, 1.0)
        ids_masked = visible.argsort(dim=1, stable=True)[:, : visible.shape[1] - ids_visible.shape[1]]
        embeddings = self.region_branch.encode(hints, ids_visible)
        pred = self.region_branch.decode(
            embeddings, self.encoder(images, ids_image), ids_visible, ids_masked, ids_image)
        return reconstruct_regions(hints, pred, ids_masked, self.encoder.patch_size)[:, :k]


class RAE(RMAE):
    """Masked region autoencoding alone (§3.1 of R-MAE): `RMAE` without its pixel decoder and pixel loss.

    Its dict has neither `pred` nor `loss_pixel`. The image still feeds the regions, which is what trains the encoder.
    """

    picture = ("image", "masked", "region_masked", "region_filled", "region_true")

    def __init__(self, encoder: ViT, mask_ratio: float = 0.75, num_regions: int = 8,
                 variant: Literal["length", "channel", "batch"] = "length",
                 region_dim: int = 128, region_heads: int = 8, region_decoder_depth: int = 1):
        nn.Module.__init__(self)  # MAE's would build the pixel decoder
        count_visible(encoder.num_patches, mask_ratio)
        self.encoder, self.mask_ratio, self.norm_pix, self.num_regions = encoder, mask_ratio, False, num_regions
        self.region_branch = RegionBranch(
            encoder, num_regions, variant, True, region_dim, region_heads, region_decoder_depth)

    def pixel_part(self, *args):
        return {}


class RegressorBlock(nn.Module):
    """A block of CAE's latent contextual regressor (§3.1): queries [B, m, D], context [B, n, D] -> queries [B, m, D].

    The positions [B, m, D] and [B, n, D] tell queries and keys where they are; values are without. What comes out of
    the attention is normed, and the MLP's residual starts from the normed value, as in the authors' code.
    """

    def __init__(self, dim, num_heads, drop_path=0.0, layer_scale=None):
        super().__init__()
        self.attn = CrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, 4 * dim)
        self.ls1, self.ls2 = (nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale) for _ in range(2))
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path else nn.Identity()

    def forward(self, queries, context, query_positions, context_positions):
        attended = self.attn(queries + query_positions, context + context_positions, context)
        x = self.norm2(queries + self.drop_path(self.ls1(attended)))
        return x + self.drop_path(self.ls2(self.mlp(x)))


class CAE(nn.Module):
    """Context autoencoder. Chen et al., "Context Autoencoder for Self-Supervised Representation Learning", IJCV 2023,
    arXiv:2202.03026.

    New: predicting and encoding are kept apart. A regressor predicts the masked patches' latents from the visible ones,
    an alignment loss holds them in the encoder's own space, and the decoder sees nothing but them; so the encoder has
    all of the representation learning, and the decoder can read what the encoder says of a whole image.

    tokenizer: see `TargetHead`; without one the target is pixels (Table 9), which norm_pix normalises as MAE does.
    encoder: the paper's has drop path 0.1, and in the authors' code layer scale 0.1 (ViT-L: 1e-5); regressor and
        decoder take over both.
    alignment_weight: lambda of Eq. 1.

    As in the authors' code, the encoder has a class token, which goes no further, and the latents that are aligned are
    those behind its last norm. They keep a second encoder for the targets, of the same weights: here it is the one.
    Sections, tables and figures are numbered as in the version under review.
    """

    inputs = ()
    encoder_options = dict(drop_path=0.1, layer_scale=0.1)  # Appendix A, and the authors' code
    picture = ("image", "masked", "filled", "full")

    def __init__(self, encoder: ViT, tokenizer=None, mask_ratio: float = 0.5, min_block: int = 16,
                 regressor_depth: int = 4, decoder_depth: int = 4, alignment_weight: float = 2.0,
                 norm_pix: bool = True):
        super().__init__()
        if encoder.relative_position:
            raise ValueError("CAE needs an encoder with a position table, not one with relative positions")
        if regressor_depth < 1 or decoder_depth < 0 or alignment_weight < 0:
            raise ValueError(f"regressor_depth={regressor_depth} must be at least 1, decoder_depth={decoder_depth} and "
                             f"alignment_weight={alignment_weight} at least 0")
        self.num_masked = encoder.num_patches - count_visible(encoder.num_patches, mask_ratio, masked_first=True)
        self.encoder, self.min_block = encoder, min(min_block, self.num_masked)
        block_masking(1, encoder.grid, self.num_masked, self.min_block)  # says at once what is wrong
        self.alignment_weight, self.norm_pix = alignment_weight, norm_pix
        D, heads, scale = encoder.embed_dim, encoder.num_heads, encoder.layer_scale
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.regressor_blocks = nn.ModuleList([
            RegressorBlock(D, heads, r, scale) for r in drop_path_rates(encoder.drop_path, regressor_depth)])
        self.regressor_norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder_blocks = nn.ModuleList([
            Block(D, heads, drop_path=r, layer_scale=scale) for r in drop_path_rates(encoder.drop_path, decoder_depth)])
        self.decoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.head = TargetHead(encoder, tokenizer, norm_pix)
        for blocks in (self.regressor_blocks, self.decoder_blocks):
            blocks.apply(init_weights)
            rescale_projections(blocks)
        nn.init.normal_(self.mask_token, std=0.02)

    def positions(self, ids):
        """The position embeddings [B, n, D] of the patches `ids`."""
        return F.embedding(ids, self.encoder.pos_embed[0, 1:])

    def regress(self, latents, ids_visible, ids_masked):
        """Latents Z_v [B, n_visible, D] of the visible patches -> predicted Z_m [B, n_masked, D] of the masked ones."""
        positions = self.positions(ids_masked)
        context_positions = torch.cat([self.positions(ids_visible), positions], dim=1)
        queries = self.mask_token.expand(len(latents), ids_masked.shape[1], -1)
        for block in self.regressor_blocks:
            context = torch.cat([latents, queries], dim=1)  # Z_v as it was, beside the last block's output
            queries = block(queries, context, positions, context_positions)
        return self.regressor_norm(queries)

    def decode(self, latents, ids):
        """Latents [B, n, D] of the patches `ids`, predicted or encoded -> pred [B, n, V or p*p*3]."""
        x = latents + self.positions(ids)
        for block in self.decoder_blocks:
            x = block(x)
        return self.head(self.decoder_norm(x))

    def reconstruct_full(self, images):
        """Whole images through encoder and decoder, no regressor (Figures 3, 10): pred [B, N, V or p*p*3]."""
        ids = torch.arange(self.encoder.num_patches, device=images.device).expand(len(images), -1)
        return self.decode(self.encoder(images)[:, 1:], ids)

    def forward(self, images, ids_visible=None, ids_masked=None):
        """images [B, 3, H, W], and optionally the mask to replay -> loss and its parts loss_align and loss_pixel, or
        loss_token with the tokens' accuracy; pred, ids_visible, ids_masked."""
        if ids_visible is None:
            ids_visible, ids_masked = block_masking(
                len(images), self.encoder.grid, self.num_masked, self.min_block, device=images.device)
        tokens = self.encoder.embed(images)
        predicted = self.regress(self.encoder.encode(tokens, ids_visible)[:, 1:], ids_visible, ids_masked)
        with torch.no_grad():  # Eq. 1's sg; after the pass with gradients, whose casts autocast keeps for both
            encoded = self.encoder.encode(tokens, ids_masked)[:, 1:]
        pred = self.decode(predicted, ids_masked)
        loss, parts = self.head.compare(pred, images, ids_masked)
        loss_align = F.mse_loss(predicted.float(), encoded.float())
        return dict(loss=loss + self.alignment_weight * loss_align, loss_align=loss_align, **parts,  # Eq. 1
                    pred=pred, ids_visible=ids_visible, ids_masked=ids_masked)


# ---------------------------------------------------------------------------------------------------------
# Tokenizer


def named(**modules):
    """nn.Sequential with these names for its parts."""
    sequential = nn.Sequential()
    for name, module in modules.items():
        sequential.add_module(name, module)
    return sequential


class DVAEConv(nn.Module):
    """Convolution that keeps height and width, [B, C_in, h, w] -> [B, C_out, h, w], with DALL-E's parameter names."""

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
        for i, kernel_size in enumerate(kernel_sizes):
            self.res_path.add_module(f"relu_{i + 1}", nn.ReLU())
            self.res_path.add_module(f"conv_{i + 1}", DVAEConv(dims[i], dims[i + 1], kernel_size))

    def forward(self, x):
        return self.id_path(x) + self.gain * self.res_path(x)


def dvae_layers(first, dims, blocks_per_group, kernel_sizes, resize, last):
    """DALL-E's encoder or decoder: first, groups of blocks to dims[1:] channels with `resize` between them, last."""
    groups = {}
    gain = 1 / ((len(dims) - 1) * blocks_per_group) ** 2
    for g in range(1, len(dims)):
        widths = [dims[g - 1]] + blocks_per_group * [dims[g]]
        blocks = {f"block_{b}": DVAEBlock(*widths[b - 1 : b + 1], kernel_sizes, gain) for b in range(1, len(widths))}
        groups[f"group_{g}"] = named(**blocks, **({"resize": resize} if g < len(dims) - 1 else {}))
    return named(blocks=named(input=first, **groups, output=named(relu=nn.ReLU(), conv=last)))


class DVAE(nn.Module):
    """Discrete VAE, the tokenizer of BEiT and CAE. Ramesh et al., "Zero-Shot Text-to-Image Generation" (DALL-E), ICML
    2021, arXiv:2102.12092, §2.1 and App. A.

    New: an image becomes a small grid of words from a learned vocabulary. In training a word is a relaxed one-hot
    vector (Gumbel-softmax), sharper as its temperature falls, so that reconstruction trains the choice of words too.

    image_size: pixels, an int or (height, width), of the images it trains on; divisible by factor = 2^(groups - 1), the
        pixels a token's side stands for. It is fully convolutional: all else takes any multiple of factor.
    kl_weight: beta of App. A.2, where a token's KL(q(word | image) || uniform) in nats is divided by the 3 * factor^2
        values that it stands for: 6.6 there, beside a log-likelihood; 2 is about as strong beside an mse near 0.2.
    tau_start, tau_end: the temperature, falling along a half-cosine (App. A.2).

    The state dict of DALL-E's released encoder loads into `encoder` with strict=True at the default sizes.
    Departs from the paper: the decoder ends in RGB under mse, not in the parameters of a logit-Laplace; kl_weight is
    not raised from 0, as it is early that it keeps words in use; the temperature falls over all of training, not its
    first 20th; and the initialisation, without which a short training collapses onto a few words (see __init__).
    """

    inputs = ("progress",)

    def __init__(self, image_size=112, vocab_size: int = 8192, hidden_dim: int = 256, groups: int = 4,
                 blocks_per_group: int = 2, kl_weight: float = 2.0, tau_start: float = 1.0, tau_end: float = 1 / 16):
        super().__init__()
        self.image_size = pair(image_size)
        self.vocab_size, self.factor = vocab_size, 2 ** (groups - 1)
        self.kl_weight, self.tau_start, self.tau_end = kl_weight, tau_start, tau_end
        if hidden_dim < 4 or hidden_dim % 4 or min(vocab_size, groups, blocks_per_group) < 1:
            raise ValueError("hidden_dim must be a multiple of 4 and vocab_size, groups, blocks_per_group at least 1, "
                             f"got {hidden_dim}, {vocab_size}, {groups}, {blocks_per_group}")
        if not (0 < tau_end <= tau_start and kl_weight >= 0):
            raise ValueError(f"tau_end={tau_end} must be positive and at most tau_start={tau_start}, and kl_weight="
                             f"{kl_weight} not negative")
        if any(s < 1 or s % self.factor for s in self.image_size):
            raise ValueError(f"image_size must be a positive multiple of {self.factor}, got {image_size}")
        widths = [hidden_dim * 2**g for g in range(groups)]
        self.encoder = dvae_layers(
            DVAEConv(3, hidden_dim, 7), [hidden_dim] + widths, blocks_per_group, (3, 3, 3, 1), nn.MaxPool2d(2),
            DVAEConv(widths[-1], vocab_size, 1))
        self.decoder = dvae_layers(
            DVAEConv(vocab_size, hidden_dim // 2, 1), [hidden_dim // 2] + widths[::-1], blocks_per_group, (1, 3, 3, 3),
            nn.Upsample(scale_factor=2), DVAEConv(hidden_dim, 3, 1))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        with torch.no_grad():
            # Pixels in [0.1, 0.9] differ little beside their mean, which alone would choose one word for all: the first
            # layer starts by taking it off and widening the rest to unit variance, the last blind to a common shift.
            first, last = self.encoder.blocks.input, self.encoder.blocks.output.conv
            first.w *= 5
            first.b.copy_(-0.46 * first.w.sum((1, 2, 3)))
            last.w -= last.w.mean(1, keepdim=True)
            # A one-hot word reaches one column of this matrix: its fan-in is 1.
            self.decoder.blocks.input.w *= math.sqrt(vocab_size)

    def logits(self, images):
        """Normalised images [B, 3, H, W] -> unnormalised log-probabilities of words [B, V, H/factor, W/factor]."""
        H, W = images.shape[-2:]
        if H % self.factor or W % self.factor:
            raise ValueError(f"image height and width must be divisible by {self.factor}, got {H}x{W}")
        pixels = (images.float() * self.std + self.mean).clamp(0, 1)
        return self.encoder(0.8 * pixels + 0.1).float()  # DALL-E's map_pixels, App. A.3

    @torch.no_grad()
    def tokens(self, images):
        """Normalised images [B, 3, H, W] -> token ids [B, H/factor, W/factor], in float32 under autocast too."""
        with torch.autocast(images.device.type, enabled=False):
            return self.logits(images).argmax(1)

    @torch.no_grad()
    def decode(self, tokens, grid):
        """Token ids [B, gh*gw] -> normalised images [B, 3, gh * factor, gw * factor]."""
        words = F.one_hot(tokens.unflatten(1, grid), self.vocab_size).permute(0, 3, 1, 2)
        return self.decoder(words.to(self.mean.dtype))

    @classmethod
    def from_encoder(cls, state):
        """The DVAE whose encoder fits a state dict of DALL-E's encoder, loaded, of any size; it has no decoder."""
        first = state.get("blocks.input.w")
        if first is None:
            raise ValueError("no tokenizer in it: no parameter is named blocks.input.w")
        blocks = {tuple(k.split(".")[1:3]) for k in state if ".block_" in k}
        groups = len({group for group, _ in blocks})
        tokenizer = cls(2 ** (groups - 1), state["blocks.output.conv.w"].shape[0], first.shape[0], groups,
                        len(blocks) // groups)
        tokenizer.encoder.load_state_dict(state)
        tokenizer.decoder = None
        return tokenizer

    def tokenize(self, images, grid):
        """Normalised images [B, 3, H, W] -> token ids [B, gh*gw] in raster order, one a patch of a (gh, gw) grid.

        The image is resized to factor pixels a patch (bicubic, antialiased, on its device; CAE: lanczos, on the CPU).
        """
        size = [self.factor * g for g in grid]
        images = F.interpolate(images.float(), size=size, mode="bicubic", antialias=True, align_corners=False)
        return self.tokens(images).flatten(1)

    def forward(self, images, progress=0.0):
        """Normalised images [B, 3, H, W] -> loss, loss_pixel (mse of normalised values), loss_kl (nats a token), pred
        [B, 3, H, W], ids [B, h, w]; perplexity and codes_used of the batch's ids (1..V), to watch for collapse.

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
        pred = self.decoder(words)
        loss_pixel = F.mse_loss(pred.float(), images.float())
        log_q = logits.log_softmax(1)
        loss_kl = (log_q.exp() * (log_q + math.log(self.vocab_size))).sum(1).mean()
        count = log_q.new_zeros(self.vocab_size).scatter_add_(0, ids.flatten(), log_q.new_ones(ids.numel()))
        perplexity = torch.special.entr(count / ids.numel()).sum().exp()
        loss = loss_pixel + self.kl_weight / (3 * self.factor**2) * loss_kl
        return dict(loss=loss, loss_pixel=loss_pixel, loss_kl=loss_kl, pred=pred, ids=ids, perplexity=perplexity,
                    codes_used=(count > 0).sum())


METHODS = {"mae": MAE, "simmim": SimMIM, "beit": BEiT, "amt": AMT, "lomar": LoMaR, "objmae": ObjMAE, "rae": RAE,
           "rmae": RMAE, "cae": CAE, "dvae": DVAE}

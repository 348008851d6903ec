"""What train.py's pictures show: every tile is what its title says, in its place."""

import types

import pytest
import torch
from torchvision.io import read_image

import datasets
import mim
import train

MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)  # ImageNet's
SIDE, P, GRID = 32, 8, 4  # pixels of an image and of a patch, patches of a side


class Painter(torch.nn.Module):
    """A method whose masks and predictions are given: of each image's patches some are visible, some masked,
    and the rest is left out."""

    def __init__(self, ids_visible, ids_masked, norm_pix=False, **out):
        super().__init__()
        self.encoder, self.norm_pix = types.SimpleNamespace(patch_size=P, grid=(GRID, GRID)), norm_pix
        self.out = dict(ids_visible=ids_visible, ids_masked=ids_masked, **out)

    def forward(self, images, **inputs):
        self.inputs = inputs
        return dict(self.out)


@pytest.fixture
def tiles(monkeypatch):
    """tiles(method, images, ...) draws -> {title: [n, 3, h, w]}."""
    drawn, picture = [], train.picture

    def note(columns, **options):
        drawn.append(columns)
        return picture(columns, **options)

    monkeypatch.setattr(train, "picture", note)

    def draw(*arguments, **options):
        train.draw_reconstruction(*arguments, **options)
        return drawn.pop()

    return draw


@pytest.fixture
def images():
    """Two pictures of noise, and what the methods get of them: (pixels in 0..1, normalised)."""
    pixels = torch.randint(256, (2, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0)) / 255
    return pixels, (pixels - MEAN) / STD


IDS_VISIBLE = torch.tensor([[0, 5, 10], [1, 2, 3]])
IDS_MASKED = torch.tensor([[15, 1], [4, 8]])


def patch(tile, sample, number):
    """Patch `number`, in raster order, of a tile."""
    row, column = divmod(number, GRID)
    return tile[sample, :, row * P:row * P + P, column * P:column * P + P]


def assert_patches(tile, expected):
    """expected: function (image, number of a patch) -> what the tile must show there."""
    assert tile.shape == (2, 3, SIDE, SIDE)
    for sample in range(2):
        for number in range(GRID**2):
            shown = patch(tile, sample, number)
            wanted = torch.as_tensor(expected(sample, number)).expand_as(shown)
            assert torch.allclose(shown, wanted, atol=1e-5), f"image {sample}, patch {number}"


def visible(pixels, otherwise, hidden=lambda sample, number: 0.0):
    """What assert_patches expects of a tile that shows the visible patches, otherwise(image, i) in the place
    of the i-th masked one, and hidden(image, number) for patches that were left out."""

    def expected(sample, number):
        masked = IDS_MASKED[sample].tolist()
        if number in masked:
            return otherwise(sample, masked.index(number))
        return patch(pixels, sample, number) if number in IDS_VISIBLE[sample] else hidden(sample, number)

    return expected


def grey(sample, number):
    return 0.5


def test_visible_patches_stay_masked_ones_are_grey_and_the_prediction_is_in_its_place(tiles, images):
    pixels, normalised = images
    pred = torch.tensor([[-0.5, 0.1], [0.3, 0.7]])[..., None].expand(-1, -1, 3 * P * P)
    shown = tiles(Painter(IDS_VISIBLE, IDS_MASKED, pred=pred), normalised)
    assert list(shown) == ["image", "masked", "reconstruction"]
    assert_patches(shown["image"], lambda sample, number: patch(pixels, sample, number))
    assert_patches(shown["masked"], visible(pixels, grey))
    assert_patches(shown["reconstruction"], visible(pixels, lambda s, i: pred[s, i, 0] * STD[0] + MEAN[0]))


def test_normalised_patches_get_their_mean_and_deviation_back(tiles, images):
    pixels, normalised = images
    true = mim.take(mim.patchify(normalised, P), IDS_MASKED)
    pred = (true - true.mean(-1, keepdim=True)) / (true.var(-1, keepdim=True) + 1e-6).sqrt()
    shown = tiles(Painter(IDS_VISIBLE, IDS_MASKED, norm_pix=True, pred=pred), normalised)["reconstruction"]
    for sample in range(2):
        for number in [*IDS_VISIBLE[sample].tolist(), *IDS_MASKED[sample].tolist()]:
            assert torch.allclose(patch(shown, sample, number), patch(pixels, sample, number), atol=1e-5)


def test_of_several_windows_the_first_is_shown(tiles, images):
    pixels, normalised = images
    ids_visible = torch.cat([IDS_VISIBLE, IDS_VISIBLE + 6], dim=1)
    ids_masked = torch.cat([IDS_MASKED, torch.full_like(IDS_MASKED, 7)], dim=1)
    pred = torch.tensor([-0.5, -0.5, 0.7, 0.7])[:, None].expand(2, 4, 3 * P * P)
    method = Painter(ids_visible, ids_masked, pred=pred)
    method.num_windows = 2
    shown = tiles(method, normalised)
    assert_patches(shown["masked"], visible(pixels, grey))
    assert_patches(shown["reconstruction"], visible(pixels, lambda *_: MEAN[0] - 0.5 * STD[0]))


class Palette:
    """A tokenizer whose token t is drawn as the grey t / 10; the tokens of an image are 9, 8, 7, ..."""

    decoder = True

    def tokenize(self, images, grid):
        self.got = images
        return (9 - torch.arange(GRID**2) % 10).expand(len(images), -1)

    def decode(self, tokens, grid):
        greys = tokens.unflatten(1, grid)[:, None] / 10
        return ((greys - MEAN) / STD).repeat_interleave(P, 2).repeat_interleave(P, 3)


def test_predicted_tokens_are_drawn_by_their_tokenizer(tiles, images):
    pixels, normalised = images
    tokens = torch.tensor([[3, 6], [2, 5]])
    method = Painter(IDS_VISIBLE, IDS_MASKED, pred=torch.nn.functional.one_hot(tokens, 10).float())
    tokenizer = Palette()
    shown = tiles(method, normalised, tokenizer=tokenizer)["reconstruction"]
    assert tokenizer.got is normalised and method.inputs["tokens"][0, :3].tolist() == [9, 8, 7]
    assert_patches(shown, visible(pixels, lambda s, i: tokens[s, i] / 10))
    tokenizer.decoder = None  # DALL-E's encoder alone
    shown = tiles(method, normalised, tokenizer=tokenizer)["reconstruction"]
    assert_patches(shown, visible(pixels, lambda *_: 0.0))


def test_a_picture_from_all_patches_has_them_all_predicted(tiles, images):
    """CAE's Figures 3 and 10. The loss is that of all patches, too."""
    _, normalised = images
    method = Painter(IDS_VISIBLE, IDS_MASKED, pred=torch.zeros(2, 2, 3 * P * P))
    full = torch.linspace(-1, 1, 32).view(2, 16, 1).expand(-1, -1, 3 * P * P)
    method.predict_whole = lambda images: full
    encoder = types.SimpleNamespace(patch_size=P, patch_dim=3 * P * P, embed_dim=4)
    method.head = mim.TargetHead(encoder, None, False)
    shown = tiles(method, normalised)
    assert list(shown) == ["image", "masked", "reconstruction", "from all patches"]
    colours = (full[..., :1, None, None] * STD + MEAN).clamp(0, 1)
    assert_patches(shown["from all patches"], lambda sample, number: colours[sample, number])
    out = train.draw_reconstruction(method, normalised)[1]
    assert out["loss_full"] == pytest.approx((full - mim.patchify(normalised, P)).square().mean().item())


def test_the_first_region_is_shown_true_masked_and_completed(tiles, images):
    maps = torch.zeros(2, 3, SIDE, SIDE)
    maps[:, 0, :, :SIDE // 2] = 1  # the left half; the others are empty
    logits = torch.full((2, 3, 2, P * P), 100.0)
    logits[:, 0] = torch.tensor([100.0, -100.0])[:, None]  # the first masked patch is inside, the second not
    method = Painter(IDS_VISIBLE, IDS_MASKED, region_maps=maps, pred_regions=logits)
    regions = torch.rand(2, 3, SIDE, SIDE)
    shown = tiles(method, images[1], regions=regions)
    assert list(shown) == ["image", "masked", "true region", "masked region", "completed"]
    assert method.inputs["regions"] is regions
    true = maps[:, :1].expand(-1, 3, -1, -1)

    def inside(sample, number):
        return patch(true, sample, number)

    assert_patches(shown["true region"], inside)
    assert_patches(shown["masked region"], visible(true, grey, inside))
    assert_patches(shown["completed"], visible(true, lambda sample, i: float(i == 0), inside))


def test_a_tokenizer_shows_images_beside_their_reconstructions(tiles, images):
    dvae = mim.DVAE(SIDE, vocab_size=8, hidden_dim=8, groups=1, blocks_per_group=1).eval()
    shown = tiles(dvae, images[1])
    assert list(shown) == ["image", "reconstruction"] and torch.allclose(shown["image"], images[0], atol=1e-6)
    expected = (dvae(images[1])["pred"] * STD[0] + MEAN[0]).clamp(0, 1)
    assert torch.allclose(shown["reconstruction"], expected, atol=1e-6)


def test_thrown_patches_are_black():
    amt = mim.AMT(mim.MAE(mim.ViT(32, 4, 32, 1, 2), decoder_dim=16, decoder_depth=1, decoder_heads=2)).eval()
    images = torch.zeros(1, 3, 32, 32)  # ImageNet's mean colour
    grid = train.draw_reconstruction(amt, images)[0][:, 16:16 + 128, 4:].unfold(2, 128, 132)
    image, masked, filled = (grid[:, :, k].reshape(3, 8, 16, 8, 16) for k in range(3))
    assert torch.allclose(image.mean((2, 4))[0], torch.full((8, 8), 0.485), atol=3e-3)
    tones = masked.mean((0, 2, 4))
    counts = [(abs(tones - tone) < 3e-3).sum().item() for tone in (0.5, 0.0)]
    assert counts == [28, 25]  # 64 patches: int(0.45 N) masked, int(0.40 N) thrown
    assert ((abs(filled.amax((0, 2, 4))) < 3e-3) == (abs(tones) < 3e-3)).all()


def test_tiles_stand_in_rows_below_their_titles():
    """Six samples of two tiles, two samples a row. Small tiles are enlarged, at whole multiples."""
    tone = torch.arange(1, 13).view(6, 2, 1, 1, 1) / 20
    a, b = tone.expand(-1, -1, 3, 40, 40).unbind(1)
    drawn = train.picture({"a": a, "": b}, per_row=2)
    assert drawn.shape == (3, 12 + 4 + 3 * 124, 4 + 4 * 124)
    for sample in range(6):
        for column in range(2):
            top, left = 16 + sample // 2 * 124, 4 + (sample % 2 * 2 + column) * 124
            tile = drawn[:, top:top + 120, left:left + 120]
            assert torch.allclose(tile, tone[sample, column].expand(3, 120, 120), atol=3e-3)
    titles = (drawn[:, :12] < 0.9).any(0).any(0)  # "a" over every first tile, nothing over the others
    assert [bool(titles[4 + 124 * k:124 + 124 * k].any()) for k in range(4)] == [True, False, True, False]
    assert not titles[30:100].any()


def test_a_run_draws_training_images_with_the_same_masks_each_time(cli, photos, tmp_path, monkeypatch):
    """Eight of them, spread evenly from the first to the last, cut in the centre."""
    monkeypatch.setitem(mim.SIZES, "nano", dict(embed_dim=16, depth=1, num_heads=2))
    flags = ["--data", photos, "--epochs", 2, "--image-size", 32, "--patch-size", 8,
             "--model", "nano", "--seed", 4]
    kept, draw = [], train.draw_reconstruction

    def note(method, images, **options):
        picture, out = draw(method, images, **options)
        kept.append((picture, images, out["ids_masked"], method.training))
        return picture, out

    monkeypatch.setattr(train, "draw_reconstruction", note)
    code, _, err = cli(train, "--method", "mae", *flags, "--output", tmp_path)
    assert code == 0, err
    centre = datasets.Images(datasets.load_data(str(photos)), 32, "center")
    expected = torch.stack([centre[i]["image"] for i in (0, 1, 3, 4, 6, 7, 9, 11)]) / 255
    assert len(kept) == 2
    for picture, images, ids_masked, training in kept:
        assert torch.allclose(images, (expected - MEAN) / STD, atol=1e-5) and not training
        assert torch.equal(ids_masked, kept[0][2])
    written = read_image(str(tmp_path / "reconstruction.png"))
    assert torch.equal(written, (255 * kept[1][0]).round().byte())  # after the last epoch
    assert not torch.equal(kept[0][0], kept[1][0])

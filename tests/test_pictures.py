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

    inputs = ("regions",)

    def __init__(self, ids_visible, ids_masked, norm_pix=False, **out):
        super().__init__()
        self.encoder, self.norm_pix = types.SimpleNamespace(patch_size=P, grid=(GRID, GRID)), norm_pix
        self.out = dict(ids_visible=ids_visible, ids_masked=ids_masked, **out)

    def forward(self, images, **inputs):
        self.given = inputs
        return dict(self.out)


@pytest.fixture
def tiles(monkeypatch):
    """tiles(method, images, ...) draws -> {title: [n, 3, h, w]}; tiles.legend: its words, tiles.out: what was
    returned beside it."""
    drawn, legends, picture = [], [], train.picture

    def note(columns, legend={}):
        drawn.append(columns)
        legends.append(list(legend))
        return picture(columns, legend)

    monkeypatch.setattr(train, "picture", note)

    def draw(*arguments, **options):
        draw.out = train.draw_reconstruction(*arguments, **options)[1]
        draw.legend = legends.pop()
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


def hatched(sample=0, number=0):
    """A patch that was left out: white with grey diagonals, a quarter of every 4 pixels."""
    diagonal = torch.arange(P)[:, None] + torch.arange(P)
    return torch.where(diagonal % 4 == 0, 0.5, 1.0)


def visible(pixels, otherwise, hidden=hatched):
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
    assert list(shown) == ["image", "source and target", "masked", "reconstruction"]
    assert tiles.legend == ["hidden, to be predicted", "left out, enters nothing"]
    both = visible(pixels, lambda s, i: patch(pixels, s, int(IDS_MASKED[s, i])))
    assert_patches(shown["source and target"], both)
    assert_patches(shown["image"], lambda sample, number: patch(pixels, sample, number))
    assert_patches(shown["masked"], visible(pixels, grey))
    assert_patches(shown["reconstruction"], visible(pixels, lambda s, i: pred[s, i, 0] * STD[0] + MEAN[0]))


def test_normalised_patches_get_their_mean_and_deviation_back(tiles, images):
    pixels, normalised = images
    true = mim.take(mim.patchify(normalised, P), IDS_MASKED)
    pred = (true - true.mean(-1, keepdim=True)) / (true.var(-1, keepdim=True) + 1e-6).sqrt()
    shown = tiles(Painter(IDS_VISIBLE, IDS_MASKED, norm_pix=True, pred=pred), normalised)
    hint, whole = "hint alone: true mean", "reconstruction, true mean and contrast given"
    assert list(shown)[-3:] == ["masked", hint, whole]
    assert_patches(shown[whole], visible(pixels, lambda s, i: patch(pixels, s, int(IDS_MASKED[s, i]))))
    assert tiles.out["error"] < 1e-10
    mean = (true.mean(-1)[..., None, None, None] * STD[0] + MEAN[0]).clamp(0, 1)  # one for the three channels
    assert_patches(shown[hint], visible(pixels, lambda s, i: mean[s, i]))
    squares = [(patch(pixels, s, int(IDS_MASKED[s, i])) - mean[s, i]).square().mean()
               for s in range(2) for i in range(2)]
    assert tiles.out["error_hint"] == pytest.approx(sum(squares).item() / 4, rel=1e-4)


def test_the_error_is_that_of_the_hidden_pixels_as_drawn(tiles):
    """White images, of which 0.9, 0.8, 0.5 and 1.5 are predicted; more than white is drawn as white."""
    greys = torch.tensor([[0.9, 0.8], [0.5, 1.5]])[..., None, None, None].expand(-1, -1, P, P, 3)
    pred = ((greys - MEAN.flatten()) / STD.flatten()).flatten(2)
    tiles(Painter(IDS_VISIBLE, IDS_MASKED, pred=pred), (torch.ones(2, 3, SIDE, SIDE) - MEAN[0]) / STD[0])
    assert tiles.out["error"] == pytest.approx((0.01 + 0.04 + 0.25 + 0) / 4, rel=1e-4)
    assert "error_hint" not in tiles.out


def test_where_nothing_is_left_out_nothing_is_said_of_it(tiles, images):
    order = torch.arange(16).expand(2, -1)
    shown = tiles(Painter(order[:, :4], order[:, 4:], pred=torch.zeros(2, 12, 3 * P * P)), images[1])
    assert list(shown) == ["image", "masked", "reconstruction"]
    assert tiles.legend == ["hidden, to be predicted"]


def test_of_several_windows_the_first_is_shown(tiles, images):
    pixels, normalised = images
    ids_visible = torch.cat([IDS_VISIBLE, IDS_VISIBLE + 5], dim=1)
    ids_masked = torch.cat([IDS_MASKED, torch.full_like(IDS_MASKED, 7)], dim=1)
    pred = torch.tensor([-0.5, -0.5, 0.7, 0.7])[:, None].expand(2, 4, 3 * P * P)
    method = Painter(ids_visible, ids_masked, pred=pred)
    method.num_windows = 2
    shown = tiles(method, normalised)
    assert list(shown) == ["image", "all windows", "masked: one window", "reconstruction"]
    assert_patches(shown["masked: one window"], visible(pixels, grey))
    assert_patches(shown["reconstruction"], visible(pixels, lambda *_: MEAN[0] - 0.5 * STD[0]))
    used = [{*ids_visible[s].tolist(), *ids_masked[s].tolist()} for s in range(2)]
    assert_patches(shown["all windows"], lambda s, k: patch(pixels, s, k) if k in used[s] else hatched())


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
    assert tokenizer.got is normalised and method.given["tokens"][0, :3].tolist() == [9, 8, 7]
    assert_patches(shown, visible(pixels, lambda s, i: tokens[s, i] / 10))
    tokenizer.decoder = None  # DALL-E's encoder alone, which draws nothing
    method.predict_whole = lambda images: torch.zeros(2, 16, 10)
    method.head = types.SimpleNamespace(loss=lambda *_: (torch.tensor(7.0), {}))
    assert list(tiles(method, normalised, tokenizer=tokenizer)) == ["image", "source and target", "masked"]
    assert "error" not in tiles.out and tiles.out["loss_full"] == 7


def test_a_picture_from_all_patches_has_them_all_predicted(tiles, images):
    """CAE's Figures 3 and 10. The loss is that of all patches, too."""
    _, normalised = images
    method = Painter(IDS_VISIBLE, IDS_MASKED, pred=torch.zeros(2, 2, 3 * P * P))
    full = torch.linspace(-1, 1, 32).view(2, 16, 1).expand(-1, -1, 3 * P * P)
    method.predict_whole = lambda images: full
    encoder = types.SimpleNamespace(patch_size=P, patch_dim=3 * P * P, embed_dim=4)
    method.head = mim.TargetHead(encoder, None, False)
    shown = tiles(method, normalised)
    assert list(shown)[-3:] == ["masked", "reconstruction", "from all patches"]
    colours = (full[..., :1, None, None] * STD + MEAN).clamp(0, 1)
    assert_patches(shown["from all patches"], lambda sample, number: colours[sample, number])
    out = train.draw_reconstruction(method, normalised)[1]
    assert out["loss_full"] == pytest.approx((full - mim.patchify(normalised, P)).square().mean().item())


def test_regions_are_shown_in_their_colours_true_masked_and_completed(tiles, images):
    """The second lies over the first; the third is empty. White is no region."""
    maps = torch.zeros(2, 3, SIDE, SIDE)
    maps[:, 0, :, :SIDE // 2], maps[:, 1, :P] = 1, 1  # the left half; the upper row of patches
    logits = torch.full((2, 3, 2, P * P), -100.0)
    logits[:, 0, 0] = 100.0  # the first masked patch is of the first region, the second of none
    method = Painter(IDS_VISIBLE, IDS_MASKED, region_maps=maps, pred_regions=logits)
    regions = torch.rand(2, 3, SIDE, SIDE)
    shown = tiles(method, images[1], regions=regions)
    assert list(shown)[-4:] == ["masked", "regions", "masked regions", "completed regions"]
    assert method.given["regions"] is regions
    first, second = train.class_colours(3)[1:, :, None, None]

    def inside(sample, number):
        row, column = divmod(number, GRID)
        return second if row == 0 else first if column < 2 else 1.0

    true = shown["regions"]
    assert_patches(true, inside)
    assert_patches(shown["masked regions"], visible(true, grey, inside))
    assert_patches(shown["completed regions"], visible(true, lambda s, i: 1.0 if i else first, inside))


def test_a_tokenizer_shows_images_beside_their_reconstructions(tiles, images):
    dvae = mim.DVAE(SIDE, vocab_size=8, hidden_dim=8, groups=1, blocks_per_group=1).eval()
    shown = tiles(dvae, images[1])
    assert list(shown) == ["image", "reconstruction"] and torch.allclose(shown["image"], images[0], atol=1e-6)
    expected = (dvae(images[1])["pred"] * STD[0] + MEAN[0]).clamp(0, 1)
    assert torch.allclose(shown["reconstruction"], expected, atol=1e-6)


def test_thrown_patches_are_hatched_and_the_attention_is_what_drew_them(tiles):
    encoder = mim.ViT(32, 8, 32, 1, 2)
    amt = mim.AMT(mim.MAE(encoder, decoder_dim=16, decoder_depth=1, decoder_heads=2)).eval()
    images = torch.zeros(2, 3, 32, 32)  # ImageNet's mean colour
    images[:, :, :16, 8:] = 1.0
    shown = tiles(amt, images)
    assert list(shown)[:3] == ["image", "attention", "masked"] and len(tiles.legend) == 3
    attention = mim.attention_map(encoder, images)
    assert torch.equal(shown["attention"], train.heat(shown["image"], attention))
    masked, thrown = tiles.out["ids_masked"], tiles.out["ids_thrown"]
    assert masked.shape == (2, 7) and thrown.shape == (2, 6)  # int(0.45 N) and int(0.40 N) of 16
    for title in ("masked", list(shown)[-1]):
        for sample in range(2):
            for number in thrown[sample].tolist():
                assert torch.equal(patch(shown[title], sample, number)[0], hatched())
    assert all((patch(shown["masked"], s, k) == 0.5).all() for s in range(2) for k in masked[s].tolist())
    amt = mim.AMT(mim.MAE(encoder, decoder_dim=16, decoder_depth=1, decoder_heads=2), throw="random").eval()
    assert list(tiles(amt, images))[:2] == ["image", "masked"]  # the attention draws nothing
    assert tiles.legend == ["hidden, to be predicted", "left out, enters nothing"]


def test_what_is_left_out_is_said_where_patches_are_repeated(tiles, images):
    """ObjMAE's lists are as long as the image has patches at alpha 0.5, its object may have fewer."""
    ids_visible, ids_masked = (ids[:, :1].repeat(1, 8) for ids in (IDS_VISIBLE, IDS_MASKED))
    method = Painter(ids_visible, ids_masked, pred=torch.zeros(2, 8, 3 * P * P))
    assert list(tiles(method, images[1])) == ["image", "source and target", "masked", "reconstruction"]
    assert tiles.legend == ["hidden, to be predicted", "left out, enters nothing"]
    everything = torch.arange(16).expand(2, -1)
    method = Painter(everything[:, 8:], everything[:, :8], pred=torch.zeros(2, 8, 3 * P * P))
    assert list(tiles(method, images[1])) == ["image", "masked", "reconstruction"]
    assert tiles.legend == ["hidden, to be predicted"]


def test_one_mask_for_all_images_leaves_nothing_out(tiles):
    method = mim.MAE(mim.ViT(32, 8, 32, 1, 2), decoder_dim=16, decoder_depth=1, decoder_heads=2).eval()
    ids = torch.randperm(16)[None]
    shown = tiles(method, torch.zeros(3, 3, 32, 32), ids_visible=ids[:, :4], ids_masked=ids[:, 4:])
    assert "source and target" not in shown and tiles.legend == ["hidden, to be predicted"]


def test_one_window_is_no_object(tiles):
    method = mim.LoMaR(mim.ViT(32, 8, 32, 1, 2, relative_position=True), window_size=3, num_windows=1).eval()
    assert list(tiles(method, torch.zeros(2, 3, 32, 32)))[:3] == ["image", "all windows", "masked"]


def test_a_long_heading_takes_several_lines(tmp_path):
    for words, lines in (("", 0), ("short", 1), ("a heading of many more words than fit into one line", 4)):
        train.save_picture(tmp_path / "a.png", torch.zeros(3, 50, 120), "reconstruct", words)
        drawn = read_image(str(tmp_path / "a.png"))
        assert drawn.shape[1:] == (17 * lines + 50, 120) and not drawn[:, 17 * lines:].any()
        ink = (drawn[:, :17 * lines] < 128).any(0).any(1).view(lines, 17).any(1)
        assert ink.all() and (drawn[:, :17 * lines, 116:] > 128).all()


def test_tiles_stand_in_rows_below_their_titles():
    """Three tiles of a sample, two samples in a row of about 1,000 pixels. Small tiles are enlarged, at whole
    multiples, to 128 pixels at least."""
    tone = torch.arange(1, 19).view(6, 3, 1, 1, 1) / 20
    tiles = tone.expand(-1, -1, 3, 100, 70).unbind(1)
    drawn = train.picture(dict(zip(("a", "", "a long title of three lines, that is"), tiles)))
    assert drawn.shape == (3, 51 + 4 + 3 * 204, 4 + 6 * 144)
    for sample in range(6):
        for column in range(3):
            top, left = 55 + sample // 2 * 204, 4 + (sample % 2 * 3 + column) * 144
            tile = drawn[:, top:top + 200, left:left + 140]
            assert torch.allclose(tile, tone[sample, column].expand(3, 200, 140), atol=3e-3)
    ink = (drawn[:, :51] < 0.5).any(0).any(0)
    first, second, third = (ink[4 + 144 * k:144 + 144 * k].nonzero() for k in range(3))
    assert len(second) == 0 and first.max() < 20 and 60 < third.max() < 140  # no title reaches the next
    assert torch.equal(ink[4:436], ink[436:868])


def test_the_legend_stands_above_with_a_swatch_for_each_word():
    swatch = torch.rand(3, 12, 24)
    legend = {"grey": torch.tensor(0.5), "red": torch.tensor([1.0, 0, 0]).view(3, 1, 1), "noise": swatch}
    drawn = train.picture({"a": torch.zeros(1, 3, 128, 256), "b": torch.zeros(1, 3, 128, 256)}, legend)
    assert drawn.shape == (3, 34 + 17 + 4 + 132, 4 + 2 * 260)  # two fit into a line
    places = ((3, 4), (3, 224), (20, 4))
    for (top, left), tone in zip(places, legend.values()):
        assert torch.allclose(drawn[:, top:top + 12, left:left + 24], tone.expand(3, 12, 24), atol=5e-3)
        assert (drawn[:, top - 3:top + 14, left + 30:left + 60] < 0.5).any()  # its word
    assert (drawn[:, 18:34, 224:] > 0.9).all()


def test_words_can_be_read_on_any_ground():
    """Dark letters with a white rim."""
    for ground in (0.0, 0.5, 1.0):
        written = train.write(torch.full((3, 30, 60), ground), {(5, 5): "star"})
        assert (written > 0.95).any() and (written < 0.05).any()
        assert (written[:, 25:] - ground).abs().max() < 0.01


def test_an_old_pillow_writes_small_letters(monkeypatch):
    """Its font has one size alone, and only Latin letters."""
    font = train.ImageFont.load_default_imagefont()
    monkeypatch.setattr(train.ImageFont, "load_default", lambda: font)
    for text in ("star", "\u661f", "\udce9"):
        assert (train.write(torch.ones(3, 30, 60), {(5, 5): text}) < 0.2).any()


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
    drawn = (255 * kept[1][0]).round().byte()  # after the last epoch
    assert torch.equal(written[:, 17:], drawn)
    assert not torch.equal(kept[0][0], kept[1][0])

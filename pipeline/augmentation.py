"""From an image file to augmented pixels: decoding, random crop, RandAugment, test crop, random erasing's boxes.

Everything random is drawn by timm's and torchvision's own code, in their order, so that from one seed the fast path
here and timm's `create_transform` make the same image, to within the pixel differences that the tests state. Where
simplejpeg or numba is missing, Pillow does its part of the work: the same pixels, later.
"""
import contextlib
import errno
import functools
import io
import math
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.nn import functional as F
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from pipeline.labels import BadLabel
from recipes import Recipe
from utils import log

try:
    import simplejpeg
except ImportError:
    simplejpeg = None
try:
    from pipeline import kernels
except (ImportError, RuntimeError):  # RuntimeError: numba finds no folder to keep its code in
    kernels = None

TINY = np.zeros((8, 8, 3), np.uint8)
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)  # above which Pillow refuses an image; 0.5 GB of RGB
CUBIC = {InterpolationMode.BICUBIC: True, InterpolationMode.BILINEAR: False}  # the filters of `kernels.resized_crop`
MAX_ASPECT = 100  # of sides; of a longer image, the test transform sees the middle


SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class BadImage(Exception):
    """An image of which no pixels can be made. Its text says why, in a few words."""


@contextlib.contextmanager
def refusing_bad_images() -> Iterator[None]:
    """Turns whatever a library raises over one image into BadImage: the one place where an image's failure is decided.

    To be put around the reading, decoding and transforming of one image, and nothing else: decoders raise nearly every
    type of exception over a damaged file. Warnings (of EXIF data, palettes, sizes) are about what Pillow could repair.
    A machine that has run out of descriptors or memory is no fault of an image, and a label without a class neither.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    except BadLabel:
        raise
    except Exception as error:
        if getattr(error, 'errno', None) in SHORTAGES:
            raise
        raise BadImage(why_bad(error)) from error


def why_bad(error: Exception) -> str:
    """Why an image cannot be read, in a few words."""
    if isinstance(error, UnidentifiedImageError):  # Pillow names a BytesIO
        return 'is no image, or of a format that Pillow does not know'
    # The type tells a fault of the program from one of the file
    kind = '' if isinstance(error, (BadImage, OSError, ValueError, SyntaxError)) else type(error).__name__
    reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
    return ': '.join(filter(None, (kind, reason))) or type(error).__name__


@functools.cache
def warn_if_slow() -> None:
    """Says once that a fast package is missing."""
    missing = [name for name, module in (('simplejpeg', simplejpeg), ('numba', kernels)) if module is None]
    if missing:
        log.warning('%s cannot be imported: the same images are made, but up to three times slower; pip install %s',
                    ' and '.join(missing), ' '.join(missing))


def seed_image(seed: int) -> None:
    """Seeds the generators from which augmentation draws: Python's, NumPy's and torch's on the CPU."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


def decode(image: Any) -> np.ndarray:
    """RGB pixels of an image, uint8 [H, W, 3], as Pillow's `convert('RGB')` gives them; EXIF's rotation is not applied.

    Args:
        image: the undecoded file as bytes, pixels as an array, or a PIL image.

    Raises:
        nearly anything, as Pillow, for what cannot be decoded; `refusing_bad_images` makes a BadImage of it.
    """
    if isinstance(image, np.ndarray):
        return image
    if isinstance(image, bytes):
        if _fast_jpeg(image):
            with contextlib.suppress(ValueError):  # damaged: Pillow forgives what can be, and says what is wrong
                return simplejpeg.decode_jpeg(image)  # libjpeg-turbo, set as Pillow sets it: the same bits
        image = Image.open(io.BytesIO(image))
    if image.mode.startswith('I'):  # 16 bits a pixel, which convert would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return np.array(image.convert('RGB'))


def _fast_jpeg(image: Any) -> tuple[int, int] | None:
    """Height and width of a file that simplejpeg decodes as Pillow does: a JPEG in colour or grey, not in CMYK.

    A larger one than Pillow takes is not among them: a damaged header may promise 4 gigapixels.
    """
    if simplejpeg is None or not isinstance(image, bytes) or not image.startswith(b'\xff\xd8'):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(image)
    except ValueError:
        return None
    return (height, width) if colors in ('YCbCr', 'Gray') and height * width <= MAX_PIXELS else None


def decode_top(image: bytes, rows: int) -> np.ndarray:
    """The upper part of a JPEG, at least so many rows of it, without decoding the rest.

    The height in the frame header is lowered, which ends the decoder early: a tenth of the time on average over random
    crops. Two blocks more than wanted are decoded, since the chroma of a row is interpolated with the block below.
    """
    position = 2
    while image.endswith(b'\xff\xd9') and position + 9 < len(image) and image[position] == 0xFF:  # whole, well-formed
        marker, length = image[position + 1], int.from_bytes(image[position + 2:position + 4], 'big')
        if marker in (0xC0, 0xC1):  # sequential; a progressive file is wanted whole
            height, keep = int.from_bytes(image[position + 5:position + 7], 'big'), (rows + 31) // 16 * 16
            if keep < height and max(image[position + 11:position + 2 + length:3]) & 15 <= 2:  # blocks of 8 or 16 rows
                lowered = image[:position + 5] + keep.to_bytes(2, 'big') + image[position + 7:]
                with contextlib.suppress(ValueError):
                    return simplejpeg.decode_jpeg(lowered, strict=False)  # what is left over would be an error
            break
        if marker in (0xC2, 0xDA):
            break
        position += 2 + length
    return decode(image)


def normalise(pixels: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(pixels - mean) * scale of uint8 [B, H, W, 3] and float32 [3]: float32 [B, 3, H, W] in channels-last memory."""
    width = pixels.shape[2]
    # Whole rows at once: the CPU takes three times as long over a mean for every third value
    rows = torch.sub(pixels.view(-1, 3 * width), mean.repeat(width)).mul_(scale.repeat(width))
    return rows.view(pixels.shape).permute(0, 3, 1, 2)


# ---- Operations of RandAugment, on arrays ---------------------------------------------------------------------------

def _through_pillow(operation: Callable[..., Image.Image]) -> Callable[..., np.ndarray]:
    """An operation on PIL images as one on arrays."""
    def apply(image: np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
        return np.array(operation(Image.fromarray(image), *args, **kwargs))
    return apply


def _bicubic(pillow: Callable[..., Image.Image], fast: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """A geometric operation: fast where the interpolation is bicubic, as in the recipes, else Pillow's."""
    def apply(image: np.ndarray, value: float, *, resample: Any, fillcolor: tuple[int, int, int]) -> np.ndarray:
        if isinstance(resample, (list, tuple)):
            resample = random.choice(resample)
        if resample != Image.Resampling.BICUBIC:
            return np.array(pillow(Image.fromarray(image), value, resample=resample, fillcolor=fillcolor))
        return fast(image, value, np.array(fillcolor, np.uint8))
    return apply


def _rotate(image: np.ndarray, degrees: float, fill: np.ndarray) -> np.ndarray:
    """Pillow's Image.rotate about the centre, with its rounding of the matrix."""
    if degrees % 360 == 0:
        return image
    height, width, _ = image.shape
    angle = -math.radians(degrees % 360)
    cos, sin, x, y = round(math.cos(angle), 15), round(math.sin(angle), 15), width / 2, height / 2
    return kernels.affine(image, cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y, fill)


def _vertical(image: np.ndarray, slope: float, offset: float, fill: np.ndarray) -> np.ndarray:
    return kernels.transpose(kernels.shift_rows(kernels.transpose(image), slope, offset, fill))


def _table(values: list[int]) -> np.ndarray:
    return np.broadcast_to(np.array(values, np.uint8), (3, 256)).copy()


@functools.lru_cache(1024)
def _point_table(kind: str, level: int) -> np.ndarray:
    """Lookup table, uint8 [3, 256], of solarize (threshold), solarize_add (added below 128) or posterize (bits)."""
    if kind == 'solarize':
        return _table([value if value < level else 255 - value for value in range(256)])
    if kind == 'solarize_add':
        return _table([min(255, value + level) if value < 128 else value for value in range(256)])
    return _table([value >> 8 - level << 8 - level for value in range(256)])


def _fast_operations() -> dict[str, Callable[..., np.ndarray]]:
    """timm's operations by the name of its functions, as numba does them. Operations not here go through Pillow."""
    def plain(kernel: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        return lambda image, *args, **_: kernel(image, *(float(arg) for arg in args))

    def point(kind: str) -> Callable[..., np.ndarray]:
        return lambda image, level, **_: kernels.lookup(image, _point_table(kind, level))

    return {
        'auto_contrast': plain(kernels.auto_contrast), 'equalize': plain(kernels.equalize),
        'brightness': plain(kernels.brightness), 'contrast': plain(kernels.contrast), 'color': plain(kernels.color),
        'sharpness': plain(kernels.sharpness),
        'desaturate': lambda image, factor, **_: kernels.color(image, min(1.0, max(0.0, 1.0 - factor))),
        'invert': lambda image, **_: kernels.lookup(image, _point_table('solarize', 0)),
        'solarize': point('solarize'), 'solarize_add': point('solarize_add'),
        'posterize': lambda image, bits, **_: image if bits >= 8 else kernels.lookup(image, _point_table('bits', bits)),
    }


GEOMETRY: dict[str, Callable[[np.ndarray, float, np.ndarray], np.ndarray]] = {
    'shear_x': lambda image, factor, fill: kernels.shift_rows(image, factor, 0.0, fill),
    'shear_y': lambda image, factor, fill: _vertical(image, factor, 0.0, fill),
    'translate_x_rel': lambda image, share, fill: kernels.shift_rows(image, 0.0, share * image.shape[1], fill),
    'translate_y_rel': lambda image, share, fill: _vertical(image, 0.0, share * image.shape[0], fill),
    'translate_x_abs': lambda image, pixels, fill: kernels.shift_rows(image, 0.0, float(pixels), fill),
    'translate_y_abs': lambda image, pixels, fill: _vertical(image, 0.0, float(pixels), fill),
    'rotate': _rotate,
}


def array_operation(operation: Callable[..., Image.Image]) -> Callable[..., np.ndarray]:
    """One of timm's operations (`timm.data.auto_augment.NAME_TO_OP`) on uint8 [H, W, 3] instead of a PIL image."""
    if kernels is not None and operation.__name__ in GEOMETRY:
        return _bicubic(operation, GEOMETRY[operation.__name__])
    fast = _fast_operations() if kernels is not None else {}
    return fast.get(operation.__name__) or _through_pillow(operation)


def on_arrays(augment: Any) -> Callable[[np.ndarray], np.ndarray]:
    """An augmentation that timm made, with its operations replaced by ours; which and how strong, timm says."""
    if isinstance(augment, RandAugment):
        operations: list[AugmentOp] = list(augment.ops)
    elif isinstance(augment, AutoAugment):
        operations = [operation for policy in augment.policy for operation in policy]
    else:  # AugMix blends PIL images
        return _through_pillow(augment)
    for operation in operations:
        operation.aug_fn = array_operation(operation.aug_fn)
        level = operation.level_fn(5, operation.hparams) if operation.level_fn else ()
        operation.aug_fn(TINY, *level, **operation.kwargs)  # compiles it, before the workers start
    if isinstance(augment, RandAugment) and augment.choice_weights is None:
        def apply(image: np.ndarray) -> np.ndarray:
            # What np.random.choice draws from a list of 15 objects, without making an array of them: 5 us, not 20
            for number in np.random.randint(0, len(operations), augment.num_layers).tolist():
                image = operations[number](image)
            return image
        return apply
    return augment


def jitter_on_arrays(jitter: transforms.ColorJitter) -> Callable[[np.ndarray], np.ndarray]:
    """torchvision's colour jitter; hue, which no recipe uses, through Pillow."""
    def apply(image: np.ndarray) -> np.ndarray:
        order, *factors = jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        for number in order.tolist():
            if factors[number] is not None:
                image = (kernels.brightness, kernels.contrast, kernels.color)[number](image, factors[number])
        return image
    if kernels is None or jitter.hue is not None:
        return _through_pillow(jitter)
    apply(TINY)
    return apply


# ---- Transforms -----------------------------------------------------------------------------------------------------

class TrainTransform:
    """The recipe's augmentation up to uint8 pixels: timm's `create_transform`, step by step on arrays."""

    def __init__(self, recipe: Recipe):
        warn_if_slow()
        self._recipe, self.size = recipe, recipe.input_size
        composed = create_transform(
            recipe.input_size, is_training=True, scale=recipe.scale, ratio=recipe.ratio, hflip=recipe.hflip,
            vflip=recipe.vflip, color_jitter=recipe.color_jitter, auto_augment=recipe.aa,
            interpolation=recipe.train_interpolation, mean=recipe.mean, std=recipe.std, use_prefetcher=True)
        self._crop: RandomResizedCropAndInterpolation = composed.transforms[0]
        self.steps = [self._on_arrays(step) for step in composed.transforms[1:-1]]  # the last makes a tensor

    def __reduce__(self) -> tuple[type, tuple[Recipe]]:
        """Worker processes that are spawned, not forked, make their own: functions on the way cannot be pickled."""
        return type(self), (self._recipe,)

    @staticmethod
    def _on_arrays(step: Any) -> Callable[[np.ndarray], np.ndarray]:
        if isinstance(step, transforms.RandomHorizontalFlip) and kernels is not None:
            kernels.mirror(TINY)
            return lambda image: kernels.mirror(image) if torch.rand(1).item() < step.p else image
        if isinstance(step, transforms.RandomVerticalFlip):
            return lambda image: np.ascontiguousarray(image[::-1]) if torch.rand(1).item() < step.p else image
        if isinstance(step, transforms.ColorJitter):
            return jitter_on_arrays(step)
        if isinstance(step, (RandAugment, AutoAugment)):
            return on_arrays(step)
        return _through_pillow(step)

    def __call__(self, image: Any) -> np.ndarray:
        """uint8 [H, W, 3] of an image that `decode` takes. Draws from the generators that `seed_image` seeds."""
        pixels = self.resized_crop(image)
        for step in self.steps:
            pixels = step(pixels)
        return pixels

    def resized_crop(self, image: Any) -> np.ndarray:
        """The random crop of an image, uint8 [size, size, 3]."""
        crop, size = self._crop, _fast_jpeg(image)
        pixels = None if size else decode(image)
        size_only = torch.empty((3, *(pixels.shape[:2] if size is None else size)), device='meta')
        top, left, rows, columns = crop.get_params(size_only, crop.scale, crop.ratio)
        rows, columns = max(rows, 1), max(columns, 1)  # of an image of a few pixels, a share may be none
        top, left = min(top, size_only.shape[1] - rows), min(left, size_only.shape[2] - columns)
        if pixels is None:
            pixels = decode_top(image, top + rows)
        mode = crop.interpolation
        if isinstance(mode, (list, tuple)):
            mode = random.choice(mode)
        # A copy, since torch resizes a strided view at half the speed
        part = np.ascontiguousarray(pixels[top:top + rows, left:left + columns])
        if mode not in (InterpolationMode.BICUBIC, InterpolationMode.BILINEAR):
            return np.array(TF.resize(Image.fromarray(part), list(crop.size), mode))
        # Pillow's filter and fixed point in vector instructions; in this layout, which torch knows as channels last
        resized = F.interpolate(torch.from_numpy(part)[None].permute(0, 3, 1, 2), crop.size, mode=mode.value,
                                antialias=True)
        return resized.permute(0, 2, 3, 1)[0].contiguous().numpy()


class TestTransform:
    """timm's test transform with the recipe's settings, up to uint8 pixels: the same bits, but for the time."""

    def __init__(self, recipe: Recipe):
        warn_if_slow()
        self.size, self._centre = recipe.test_size, recipe.crop_mode == 'center'
        self._transform = create_transform(
            recipe.test_size, interpolation=recipe.interpolation, crop_pct=recipe.crop_pct, crop_mode=recipe.crop_mode,
            mean=recipe.mean, std=recipe.std, use_prefetcher=True)
        resize, crop = self._transform.transforms[:2]
        self._fast = kernels is not None and type(resize) is transforms.Resize and (
            type(crop) is transforms.CenterCrop) and resize.interpolation in CUBIC
        if self._fast:
            self._resize_to, self._crop_to, self._cubic = resize.size, crop.size, CUBIC[resize.interpolation]
            kernels.resized_crop(TINY, 8, 8, 0, 0, 8, 8, self._cubic)  # compiles it, before the workers start

    def __call__(self, image: Any) -> np.ndarray:
        """uint8 [H, W, 3] of an image that `decode` takes."""
        pixels = decode(image)
        if self._centre:
            # Resized by its shorter side before the crop, a line of 60,000 pixels would be 4 gigapixels
            longest = MAX_ASPECT * min(pixels.shape[:2])
            top, left = (max(side - longest, 0) // 2 for side in pixels.shape[:2])
            pixels = pixels[top:top + longest, left:left + longest]
        height, width = self._resized(*pixels.shape[:2]) if self._fast else (0, 0)
        rows, columns = self._crop_to if self._fast else (1, 1)
        if height >= rows and width >= columns and min(pixels.shape[:2]) >= kernels.ROWS:
            top, left = (round((whole - part) / 2) for whole, part in ((height, rows), (width, columns)))
            return kernels.resized_crop(np.ascontiguousarray(pixels), height, width, top, left, rows, columns,
                                        self._cubic)
        return self._transform(Image.fromarray(pixels)).permute(1, 2, 0).numpy()

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """The size to which an image is resized: as given, or its shorter side and the longer one along with it."""
        if not isinstance(self._resize_to, int):
            return tuple(self._resize_to)
        short, long = self._resize_to, int(self._resize_to * max(height, width) / min(height, width))
        return (short, long) if height <= width else (long, short)


def erasing_boxes(recipe: Recipe) -> np.ndarray:
    """Boxes to erase in one image, int32 [recount, 4]: top, left, height, width; height 0 erases nothing.

    Random Erasing (arXiv 1708.04896) with timm's areas (2 % to a third, shared among the boxes) and aspect ratios (0.3
    to 3.3), drawn here from the image's seed since the erasing itself happens on the device.
    """
    boxes, side = np.zeros((recipe.recount, 4), np.int32), recipe.input_size
    if random.random() >= recipe.reprob:
        return boxes
    count = random.randint(1, recipe.recount)
    for box in boxes[:count]:
        for _ in range(10):
            area = random.uniform(0.02, 1 / 3) * side * side / count
            aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < side and width < side:
                box[:] = random.randint(0, side - height), random.randint(0, side - width), height, width
                break
    return boxes

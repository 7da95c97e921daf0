"""The data sets that a config may name."""

from collections.abc import Callable

from lamina.platform.data.arrays import arrays
from lamina.platform.data.dataset import Dataset
from lamina.platform.data.derived import derived
from lamina.platform.data.digits import digits
from lamina.platform.data.fashion_mnist import fashion_mnist
from lamina.platform.data.mixture import mixture
from lamina.platform.data.python_domains import python_domains
from lamina.platform.data.python_stdlib import python_stdlib
from lamina.platform.data.quadratic import quadratic
from lamina.platform.data.synthetic import synthetic_images, synthetic_tokens
from lamina.platform.data.text import text
from lamina.platform.data.tfds import tfds

DATASETS: dict[str, Callable[..., Dataset]] = {
    "arrays": arrays,
    "derived": derived,
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "mixture": mixture,
    "python_domains": python_domains,
    "python_stdlib": python_stdlib,
    "quadratic": quadratic,
    "synthetic_images": synthetic_images,
    "synthetic_tokens": synthetic_tokens,
    "text": text,
    "tfds": tfds,
}

"""Conditional variational autoencoder: bounds on log p(x|y), pictures and features.

    z ~ N(centre(y), I)
    p(x|z, y) = prod_i p(x_i|z, y), over pixels and channels i
    q(z|x, y) = N(mean, exp(log_variance)), diagonal

Kingma and Welling, 2014 (https://arxiv.org/abs/1312.6114). Labels condition the model in
one of two ways. Either encoder and decoder see the label and every centre is 0, as in Sohn
et al., 2015; or only the prior depends on the label, and neither p(x|z) nor q(z|x) does.
The log-weights

    w_k = log p(x|z_k, y) + log p(z_k|y) - log q(z_k|x, y),  z_k ~ q(z|x, y)

give two lower bounds on log p(x|y): the ELBO, E[w_1], and the tighter IWAE-K,
E[logsumexp_k w_k - log K] (Burda et al., 2016, https://arxiv.org/abs/1509.00519).

The encoder's trunk sees x alone, and the label joins after it. The bounds of all labels
therefore cost one pass of the trunk and, with labels in the prior, one of the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan  # private path: torch is pinned
from torch.nn import functional

from likely.errors import InvalidInput
from likely_export import logistic
from likely_export.limits import at_least, in_unit_interval
from likely_export.moves import NO_MOVES, Moves
from likely_export.trunks import layers, trunk

NARROWEST, WIDEST = -10.0, 4.0  # bounds of log_variance
OUTPUTS_PER_STEP = 1 << 26  # decoder outputs per step of validation; memory is proportional to it
MAX_FACTORS = 120  # a product of so many factors of at least 1/2 is a normal float32: >= 2 ** -126


@dataclass(frozen=True)
class CVAEConfig:
    """Configuration of a CVAE.

    Attributes:
        shape: channels, rows, columns of a picture.
        levels: levels of a channel.
        labels: number of labels to condition on; 0 for the VAE of p(x), which ignores y.
        latent: size of z.
        width: features of every hidden layer.
        depth: hidden layers of the encoder's trunk, and of the decoder.
        logistics: number of discretised logistics in the mixture of a pixel, which knows that
            levels are ordered; 0 for a softmax over the levels.
        importance_samples: K of the bound that is validated and served.
        training_samples: K of the bound that is trained; 1 is the ELBO.
        dropout: share of hidden features dropped in training.
        convolutions: channels of the trunk's first stages, each of which halves height and
            width; empty for a trunk of linear layers only.
        convolution_depth: 3x3 convolutions per stage; the last one has a stride of 2.
        contrast: weight in the training loss of -log p(y|x), computed by Bayes' rule from the
            bounds of all labels; 0 for the bound alone.
        moves: augmentation of training pictures.
        label_prior: whether only the prior depends on the label, as in a mixture with one
            component per label; otherwise encoder and decoder see the labels, if any.
    """

    shape: tuple[int, int, int]
    levels: int
    labels: int
    latent: int = 16
    width: int = 256
    depth: int = 1
    logistics: int = 0
    importance_samples: int = 64
    training_samples: int = 1
    dropout: float = 0.0
    convolutions: tuple[int, ...] = ()
    convolution_depth: int = 1
    contrast: float = 0.0
    moves: Moves = NO_MOVES
    label_prior: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.moves, Mapping):  # as stored in a file of weights
            object.__setattr__(self, "moves", Moves(**self.moves))
        at_least(1, self, "latent", "width", "depth", "convolutions", "convolution_depth")
        at_least(1, self, "importance_samples", "training_samples")
        at_least(0, self, "labels", "logistics")
        in_unit_interval(self, "dropout")
        for name in ("label_prior", "contrast"):
            if not self.labels and getattr(self, name):
                raise InvalidInput(name, "needs labels, and there are none")

    @property
    def networks_see_label(self) -> bool:
        """Whether encoder and decoder see the label."""
        return self.labels > 0 and not self.label_prior


class CVAE(nn.Module):
    """A lower bound on log p(x|y) of discrete pictures."""

    def __init__(self, config: CVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.dimensions = math.prod(config.shape)
        width, terms = config.width, config.logistics
        self.trunk = trunk(
            config.shape,
            convolutions=config.convolutions,
            convolution_depth=config.convolution_depth,
            width=width,
            depth=config.depth,
            dropout=config.dropout,
        )
        if config.label_prior:
            self.centre = nn.Embedding(config.labels, config.latent)
        if config.networks_see_label:
            self.encoder_label = nn.Embedding(config.labels, width)
        self.encoder_join = nn.Linear(width, width)
        self.posterior_out = nn.Linear(width, 2 * config.latent)
        if config.networks_see_label:
            self.decoder_label = nn.Embedding(config.labels, width)
        self.decoder_in = nn.Linear(config.latent, width)
        self.decoder = layers(width, width, config.depth - 1, config.dropout)
        self.decoder_out = nn.Linear(width, self.dimensions * (3 * terms or config.levels))
        self.dropout = nn.Dropout(config.dropout)
        if config.contrast:
            # An inverse temperature: bounds are sums over pixels, far overconfident about labels.
            self.sureness = nn.Parameter(torch.tensor(0.1))
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Starts with a posterior near the prior, and a mixture that spans the levels."""
        self.posterior_out.weight.mul_(0.1)
        if self.config.networks_see_label:
            self.encoder_label.weight.mul_(0.1)
            self.decoder_label.weight.mul_(0.3)
        if terms := self.config.logistics:
            bias = self.decoder_out.bias.view(3, terms, self.dimensions)
            bias[1] = torch.linspace(-1, 1, terms + 2)[1:-1, None]
            bias[2] = -1.5

    def encode(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x, y), each (n, z).

        Args:
            x: levels, uint8 (n, c, h, w).
            y: labels, int64 (n,).
        """
        return self.posterior(self.features(x), y)

    def log_probs(self, z: Tensor, y: Tensor) -> Tensor:
        """log p of every level of every pixel given z (n, z) and y (n,), (n, c, h, w, levels)."""
        tables = self._tables(self.decode(z[:, None], y)[:, 0])
        return torch.unflatten(tables, 1, self.config.shape)

    def clamped_mean(self, z: Tensor, y: Tensor) -> Tensor:
        """The mean picture given z (n, z) and y (n,), levels scaled to [0, 1], (n, c, h, w).

        Mixtures of logistics give `logistic.clamped_mean`, which is not quite their mean.
        """
        parameters = self.decode(z[:, None], y)[:, 0]
        if self.config.logistics:
            means = logistic.clamped_mean(parameters)
        else:
            levels = torch.linspace(0, 1, self.config.levels, device=z.device)
            means = torch.softmax(parameters, -1) @ levels
        return torch.unflatten(means, 1, self.config.shape)

    def log_weights(self, x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        """w_k in nats, (n, k).

        Args:
            x: levels, uint8 (n, c, h, w).
            y: labels, int64 (n,).
            eps: standard normal noise (n, k, z).
        """
        return self.log_weights_of_features(self.features(x), x.flatten(1)[:, None], y, eps)

    def iwae(self, x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        """The IWAE-K bound on log p(x|y) in nats, (n,), from standard normal noise (n, k, z)."""
        return _log_mean_exp(self.log_weights(x, y, eps))

    def elbo(self, x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        """The ELBO in nats, (n,), estimated from standard normal noise (n, k, z)."""
        return self.log_weights(x, y, eps).mean(-1)

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """The training loss in nats, (n,): the negated bound, plus the contrast's share if any."""
        if self.config.moves:
            x = self.config.moves.apply(x)
        shape = (len(x), self.config.training_samples, self.config.latent)
        eps = torch.randn(shape, device=x.device)
        if not self.config.contrast:
            return -self.iwae(x, y, eps)
        labels = torch.arange(self.config.labels, device=x.device)
        features, levels = self.features(x)[:, None], x.flatten(1)[:, None, None]
        bounds = _log_mean_exp(self.log_weights_of_features(features, levels, labels, eps[:, None]))
        label_nll = functional.cross_entropy(bounds * self.sureness, y, reduction="none")
        return self.config.contrast * label_nll - bounds.gather(1, y[:, None])[:, 0]

    def evaluate(self, x: Tensor, y: Tensor) -> Tensor:
        """The negated IWAE-K bound in nats, (n,), with the same noise in every call."""
        shape = (len(x), self.config.importance_samples, self.config.latent)
        eps = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(x.device)
        per_picture = self.config.importance_samples * self.decoder_out.out_features
        parts = zip(
            *(rows.split(max(1, OUTPUTS_PER_STEP // per_picture)) for rows in (x, y, eps)),
            strict=True,
        )
        return torch.cat([-self.iwae(*part) for part in parts])

    def features(self, x: Tensor) -> Tensor:
        """The trunk's output (n, width) for x, uint8 (n, c, h, w)."""
        scaled = x.float() * (2 / (self.config.levels - 1)) - 1
        features: Tensor = self.trunk(scaled)
        return features

    def from_centre(self, z: Tensor, y: Tensor) -> Tensor:
        """z (..., z) relative to the mean of p(z|y), with y broadcast against (...)."""
        return z - self.centre(y) if self.config.label_prior else z

    def sample_prior(self, eps: Tensor, y: Tensor) -> Tensor:
        """z ~ p(z|y), (n, z), from standard normal noise (n, z) and labels (n,)."""
        return eps + self.centre(y) if self.config.label_prior else eps

    def posterior(self, features: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (..., z), from features (..., width) and y broadcast against (...).

        If only the prior depends on labels, y is ignored and the shape is that of the features.
        """
        if self.config.networks_see_label:
            features = features + self.encoder_label(y)
        joined = torch.relu(self.encoder_join(features))
        mean, log_variance = self.posterior_out(self.dropout(joined)).chunk(2, -1)
        return mean, log_variance.clamp(NARROWEST, WIDEST)

    def decode(self, z: Tensor, y: Tensor) -> Tensor:
        """Parameters of all pixels: logits (..., k, d, levels), or mixtures (..., k, 3, terms, d).

        Args:
            z: (..., k, z).
            y: int64, broadcast against (...).
        """
        return self._decoded(self._hidden(z, y))

    def log_weights_of_features(
        self, features: Tensor, x: Tensor, y: Tensor, eps: Tensor
    ) -> Tensor:
        """w_k in nats, (..., k).

        Args:
            features: the trunk's output, broadcast against (..., width).
            x: levels, broadcast against (..., k, d).
            y: int64, broadcast against (...).
            eps: standard normal noise, broadcast against (..., k, z).
        """
        return self.log_weights_of_posterior(*self.posterior(features, y), x, y, eps)

    def log_weights_of_posterior(
        self, mean: Tensor, log_variance: Tensor, x: Tensor, y: Tensor, eps: Tensor
    ) -> Tensor:
        """w_k in nats, (..., k), from the posterior's mean and log-variance (..., z)."""
        z = mean[..., None, :] + torch.exp(log_variance / 2)[..., None, :] * eps
        away = self.from_centre(z, y[..., None]).square()
        # log p(z|y) - log q(z|x, y); the constants of both densities cancel.
        prior_to_posterior = 0.5 * (eps.square() - away + log_variance[..., None, :]).sum(-1)
        return self._log_likelihood(self._hidden(z, y), x) + prior_to_posterior

    def _hidden(self, z: Tensor, y: Tensor) -> Tensor:
        """The decoder's last hidden features, (..., k, width)."""
        offset = self.decoder_in.bias
        if self.config.networks_see_label:
            offset = (offset + self.decoder_label(y))[..., None, :]
        hidden = functional.linear(z, self.decoder_in.weight) + offset
        features: Tensor = self.decoder(self.dropout(torch.relu(hidden)))
        return features

    def _decoded(self, hidden: Tensor) -> Tensor:
        parameters: Tensor = self.decoder_out(hidden)
        if terms := self.config.logistics:
            return torch.unflatten(parameters, -1, (3, terms, self.dimensions))
        return torch.unflatten(parameters, -1, (self.dimensions, self.config.levels))

    def _log_likelihood(self, hidden: Tensor, x: Tensor) -> Tensor:
        """log p(x|z, y) in nats, (..., k), from features; x is broadcast against (..., k, d)."""
        if torch.is_autocast_enabled(hidden.device.type):
            # Mixed precision may round in the hidden layers, but not in the head.
            with torch.autocast(hidden.device.type, enabled=False):
                return self._log_likelihood(hidden.float(), x)
        if self.config.levels == 2 and not self.config.logistics:
            return self._bernoulli(hidden, x)
        parameters = self._decoded(hidden)
        if self.config.logistics:
            return logistic.log_prob(parameters, x.float(), self.config.levels).sum(-1)
        tables = self._tables(parameters)
        taken = x.long()[..., None].expand(*tables.shape[:-1], 1)
        return tables.gather(-1, taken)[..., 0].sum(-1)

    def _bernoulli(self, hidden: Tensor, x: Tensor) -> Tensor:
        """log p(x|z, y) for two levels: the sum of x l - softplus(l), l the log-odds of level 1."""
        weight = self.decoder_out.weight.unflatten(0, (self.dimensions, 2))
        bias = self.decoder_out.bias.unflatten(0, (self.dimensions, 2))
        # As one matrix, so that a single Gemm adds the bias.
        rows = functional.linear(
            hidden.flatten(0, -2), weight[:, 1] - weight[:, 0], bias[:, 1] - bias[:, 0]
        )
        log_odds = rows.reshape(*hidden.shape[:-1], self.dimensions)
        # softplus(l) = relu(l) - log sigmoid(|l|) never overflows. The sigmoids are at least 1/2,
        # so that many of them are multiplied before one logarithm is taken.
        sigmoids = torch.sigmoid(log_odds.abs()).unflatten(-1, (_factor_count(self.dimensions), -1))
        chosen = (log_odds @ x.float().transpose(-1, -2))[..., 0]
        return chosen - torch.relu(log_odds).sum(-1) + torch.log(sigmoids.prod(-2)).sum(-1)

    def _tables(self, parameters: Tensor) -> Tensor:
        if self.config.logistics:
            return logistic.log_probs(parameters, self.config.levels)
        return torch.log_softmax(parameters, -1)


class Conditional(nn.Module):
    """The graph of the IWAE-K bounds on log p(x|y) for all labels.

    A Scan processes one picture after another: the arrays for all labels and samples of one
    picture fit a CPU's cache, those of a batch do not. The encoder runs once per batch.
    """

    def __init__(self, model: CVAE) -> None:
        super().__init__()
        self.model = model

    @torch.no_grad()
    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        """log_pxy float32 (n, labels), nats.

        Args:
            x: levels, uint8 (n, c, h, w).
            eps: standard normal noise (n, k, z), which all labels share, so that its effect
                cancels in their differences.
        """
        labels = torch.arange(self.model.config.labels, device=x.device)
        mean, log_variance = self.model.posterior(self.model.features(x)[:, None], labels)

        def picture(state: list[Tensor], inputs: list[Tensor]) -> tuple[list[Tensor], Tensor]:
            """Returns an unused state, and log_pxy (labels,) of one picture."""
            mean, log_variance, levels, eps = inputs
            weights = self.model.log_weights_of_posterior(
                mean, log_variance, levels[None, None], labels, eps
            )
            return [state[0].clone()], _log_mean_exp(weights)

        inputs = [mean, log_variance, x.flatten(1), eps]
        log_pxy: Tensor = scan(picture, [eps.new_full((1,), 0.0)], inputs)[1]
        return log_pxy


class Generate(nn.Module):
    """The graph that draws a picture of a label."""

    def __init__(self, model: CVAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, y: Tensor, eps: Tensor, gumbel: Tensor) -> Tensor:
        """x: levels, uint8 (n, c, h, w).

        Args:
            y: labels, int64 (n,).
            eps: standard normal noise (n, z).
            gumbel: standard Gumbel noise (n, h, w, c, levels).
        """
        log_probs = self.model.log_probs(self.model.sample_prior(eps, y), y).permute(0, 2, 3, 1, 4)
        return (log_probs + gumbel).argmax(-1).permute(0, 3, 1, 2).to(torch.uint8)


class Encode(nn.Module):
    """The graph that encodes a picture under a label, relative to the mean of the label's prior."""

    def __init__(self, model: CVAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, float32 (n, z), of x, uint8 (n, c, h, w), and y, int64 (n,)."""
        mean, log_variance = self.model.encode(x, y)
        return self.model.from_centre(mean, y), log_variance


def _factor_count(count: int) -> int:
    """The largest divisor of `count` for which a product of as many factors stays normal."""
    return max(n for n in range(1, MAX_FACTORS + 1) if count % n == 0)


def _log_mean_exp(log_weights: Tensor) -> Tensor:
    """log mean_k exp(w_k), (..., k) to (...)."""
    return torch.logsumexp(log_weights, -1) - math.log(log_weights.shape[-1])

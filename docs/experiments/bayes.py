"""The surrogate of AutoPEFT's Bayesian optimisation: which configurations to evaluate next.

Zhou et al. 2024 fit a fully Bayesian SAAS Gaussian process by NUTS. Here its hyper-parameters are those of
the maximum a posteriori under the same sparse prior: with botorch its AdditiveMapSaasSingleTaskGP and
qLogExpectedImprovement, else the small one below, named "own": ARD Matern-5/2, expected improvement, and for
a batch the last choice's mean taken for its outcome (kriging believer). Outcomes go through a Gaussian
copula: their ranks' normal quantiles.
"""

import importlib.util
import math

import torch


def name_of(surrogate):
    """Which of the two is meant."""
    if surrogate != "auto":
        return surrogate
    return "botorch" if importlib.util.find_spec("botorch") else "own"


def propose(tried, scores, candidates, count, surrogate="auto", seed=0):
    """`count` of the candidates.   tried, candidates: tuples of integers.   scores: of tried, higher is better."""
    torch.manual_seed(seed)
    x, new = torch.tensor(tried).double(), torch.tensor(candidates).double()
    top = torch.cat([x, new]).amax(0).clamp(min=1)
    x, new, y = x / top, new / top, copula(torch.tensor(scores).double())
    chosen = (with_botorch if name_of(surrogate) == "botorch" else own)(x, y, new, count)
    return [candidates[i] for i in chosen]


def copula(y):
    """Normal quantiles of the ranks; equal scores get equal ones."""
    below, equal = (y[:, None] > y).sum(1), (y[:, None] == y).sum(1)
    return torch.special.ndtri((below.double() + equal / 2) / len(y))


def with_botorch(x, y, new, count):
    from botorch.acquisition.logei import qLogExpectedImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models.map_saas import AdditiveMapSaasSingleTaskGP
    from botorch.optim import optimize_acqf_discrete
    from gpytorch.mlls import ExactMarginalLogLikelihood
    model = AdditiveMapSaasSingleTaskGP(x, y[:, None])
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    acquisition = qLogExpectedImprovement(model, best_f=y.max())
    found, _ = optimize_acqf_discrete(acquisition, q=count, choices=new, unique=True)
    return [int((new - row).abs().sum(1).argmin()) for row in found]


def own(x, y, new, count):
    """Indices of `new`, by expected improvement under the process at its maximum a posteriori."""
    logs = fit(x, y)
    chosen, best = [], y.max()
    for _ in range(count):
        mean, deviation = posterior(x, y, new, logs)
        score = (mean - best) / deviation
        normal = torch.exp(-score.square() / 2) / math.sqrt(2 * math.pi)
        improvement = deviation * (score * torch.special.ndtr(score) + normal)
        improvement[chosen] = -1
        chosen.append(int(improvement.argmax()))
        x, y = torch.cat([x, new[chosen[-1:]]]), torch.cat([y, mean[chosen[-1:]]])
    return chosen


def kernel(a, b, inverse_squares):
    """Matern-5/2:  (1 + d + d^2/3) exp(-d), d = sqrt(5 sum_i rho_i (a_i - b_i)^2)"""
    squares = ((a[:, None] - b) ** 2 * inverse_squares).sum(2)
    d = (5 * squares + 1e-12).sqrt()
    return (1 + d + d.square() / 3) * torch.exp(-d)


def parts(logs):
    """rho, [D], outcome scale, noise, tau, of their logarithms."""
    return logs[3:].exp(), logs[0].exp(), logs[1].exp() + 1e-4, logs[2].exp()


def fit(x, y):
    """Logarithms of scale, noise, tau and rho, at the maximum of likelihood · prior:
    rho_i ~ HalfCauchy(tau), tau ~ HalfCauchy(0.1), log scale and log noise ~ N(0, 1), N(-2, 1).
    """
    logs = torch.cat([torch.tensor([0.0, -2.0, -2.0]), torch.zeros(x.shape[1])]).double().requires_grad_()
    optimizer = torch.optim.Adam([logs], lr=0.05)
    for _ in range(200):
        rho, scale, noise, tau = parts(logs)
        root = torch.linalg.cholesky(scale * kernel(x, x, rho) + noise * torch.eye(len(x)))
        solved = torch.cholesky_solve(y[:, None], root)[:, 0]
        fitted = -(y * solved).sum() / 2 - root.diagonal().log().sum()
        # Densities of the logarithms: each has its value as a factor.
        prior = (-torch.log1p((rho / tau).square()) - tau.log() + rho.log()).sum()
        prior = prior - torch.log1p((tau / 0.1).square()) + tau.log() - logs[0].square() / 2 - (logs[1] + 2).square() / 2
        optimizer.zero_grad()
        (-fitted - prior).backward()
        optimizer.step()
    return logs.detach()


def posterior(x, y, new, logs):
    """Mean and deviation at `new`."""
    rho, scale, noise, _ = parts(logs)
    root = torch.linalg.cholesky(scale * kernel(x, x, rho) + noise * torch.eye(len(x)))
    across = scale * kernel(new, x, rho)
    mean = across @ torch.cholesky_solve(y[:, None], root)[:, 0]
    reduction = torch.linalg.solve_triangular(root, across.T, upper=False).square().sum(0)
    return mean, (scale - reduction).clamp(min=1e-9).sqrt()

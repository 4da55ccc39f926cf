"""The paper's claims (arXiv 2410.00531), each with what was measured here: confirmed, better, worse, or not so."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.experiments.tables import Found, by_network, mb, ms, per_token, seconds, times
from bench.home.devices import parse_bandwidth

NEAR_SHARE = 0.9  # of a claimed figure is still that figure, on machines as noisy as these
ALIKE_SHARE = 0.15  # two of our own figures that differ by less say nothing
Claim = tuple[str, str, str]


def claims(found: Sequence[Found]) -> list[Claim]:
    """(claim, verdict, figures) of each claim."""
    return [(text, *judge(found)) for text, judge in _CLAIMS.items()]


_NOT_MEASURED = ("not measured", "")


def _one(found: Sequence[Found], **settings: object) -> Found | None:
    return next((each for each in found if all(each[key] == value for key, value in settings.items())), None)


def _verdict(measured: float, claimed: float) -> str:
    """Of something of which more is better."""
    if measured >= claimed / NEAR_SHARE:
        return "better"
    return "confirmed" if measured >= claimed * NEAR_SHARE else "worse" if measured > 1 else "not so"


def _verdict_less(less: float, low: float, high: float) -> str:
    """Of something that is to be less by a share between `low` and `high`: a tenth counts of what is left of it."""
    if 1 - less < (1 - high) * NEAR_SHARE:
        return "better"
    return "confirmed" if 1 - less <= (1 - low) / NEAR_SHARE else "worse" if less > 0 else "not so"


def _pair(found: Sequence[Found], model: str, fmt: str, memory: str) -> tuple[Found, Found] | None:
    same = {"experiment": "devices", "shape": model, "format": fmt, "memory": memory}
    one, four = (_one(found, devices=devices, **same) for devices in (1, 4))
    return (one, four) if one and four else None


def _gains(pair: tuple[Found, Found]) -> tuple[float, float]:
    one, four = (each.figures for each in pair)
    return one["ttft_s"] / four["ttft_s"], one["s_per_token"] / four["s_per_token"]


def _several_devices(found: Sequence[Found]) -> tuple[str, str]:
    said, verdicts = [], []
    for memory in ("4GiB", "1GiB"):
        if pair := _pair(found, "open-llama-3b", "f32", memory):
            first, token = _gains(pair)
            verdict = min(_verdict(first, 61 / 2.5), _verdict(token, 30 / 2), key=_ORDER.index)
            cold = _verdict(pair[0].first_cold_s / pair[1].first_cold_s, 61 / 2.5)
            verdicts.append(f"{verdict} with {memory} a device, {cold} for a cold first token")
            said.append(f"{memory}: {_one_against_four(pair)}")
    return ("; ".join(verdicts), "; ".join(said)) if said else _NOT_MEASURED


def _one_against_four(pair: tuple[Found, Found]) -> str:
    one, four = (each.figures for each in pair)
    names = (("a token", "s_per_token"), ("first token", "ttft_s"), ("cold", "ttft_cold_s"))
    return ", ".join(
        f"{what} {seconds(one[name])} → {seconds(four[name])} ({times(one[name] / four[name])} times)"
        for what, name in names
    )


_ORDER = ("not so", "worse", "confirmed", "better")


def _ours(found: Sequence[Found]) -> tuple[str, str]:
    if not (pair := _pair(found, "llama-2-7b", "q4_0", "1GiB")):
        return _NOT_MEASURED
    first, token = _gains(pair)
    return "confirmed" if first >= 10 and token >= 12 else "not so", _one_against_four(pair)


def _offloading(found: Sequence[Found]) -> tuple[str, str]:
    home = {"experiment": "peers", "shape": "llama-2-7b", "memory": "1GiB"}
    four, one = (_one(found, program="tpimpi", format="bf16", devices=devices, **home) for devices in (4, 1))
    if four is None or one is None:
        return _NOT_MEASURED
    said, least = [], []
    for program in ("accelerate", "airllm"):
        theirs = _one(found, program=program, **home)
        if theirs is not None and "killed" not in theirs.figures:
            token = theirs.figures["s_per_token"]
            of_four, of_one = (1 - each.figures["s_per_token"] / token for each in (four, one))
            least.append(of_four)
            said.append(f"{_less(of_four)} {program} ({_token_and_first(theirs)}), one device {_less(of_one)} it")
    if not least:
        return _NOT_MEASURED
    quantized = _one(found, program="tpimpi", format="q4_0", devices=4, **home)
    small = "" if quantized is None else f"; in q4_0 {_token_and_first(quantized)}"
    return (
        _verdict_less(min(least), 0.8, 0.9),
        f"7B in bf16, four devices, {_token_and_first(four)}: a token takes {'; '.join(said)}{small}",
    )


def _less(less: float) -> str:
    """Of a time that is less by this share than another, or more where it is negative."""
    if abs(less) < ALIKE_SHARE:
        return "about the same as"
    return f"{100 * abs(less):.0f} % {'less' if less > 0 else 'more'} than"


def _token_and_first(found: Found) -> str:
    return f"{per_token(found.figures['s_per_token'])} s a token, cold first token {seconds(found.first_cold_s)}"


def _seventy(found: Sequence[Found]) -> tuple[str, str]:
    row = _one(found, experiment="70b", measure="generate", shape="llama-2-70b", layers=0, memory="512MiB")
    if row is None or row.peak is None:
        return _NOT_MEASURED
    part = sum(row.figures["pinned_bytes"] + row.figures["streamed_bytes_per_token"]) / row["devices"]
    less = 1 - row.peak / part
    return _verdict_less(less, 0.9, 0.9), (
        f"{mb(row.peak)} on the device that took most, {100 * less:.0f} % less than an eighth of the weights in q4_0, "
        f"{mb(part)}; {per_token(row.figures['s_per_token'])} s a token where all eight share one disk (the paper: 3.1 GB "
        "and 26.1 s, with a disk each)"
    )


def _latency(found: Sequence[Found]) -> tuple[str, str]:
    rows = [
        each
        for each in found
        if each["experiment"] == "network" and each["measure"] == "generate" and each["allreduce"] == "star"
    ]
    at = {(each["latency"], each["bandwidth"]): each.figures for each in rows}
    near, middle, narrow = ("0.3ms", "300Mbit/s"), ("2ms", "300Mbit/s"), ("2ms", "50Mbit/s")
    far, wide = ("10ms", "300Mbit/s"), ("2ms", "1Gbit/s")
    if any(key not in at for key in (near, middle, narrow, far, wide)):
        return _NOT_MEASURED

    def costs(figure: str, better: tuple[str, str], worse: tuple[str, str]) -> float:
        return float(at[worse][figure] / at[better][figure])

    token, prompt = (
        (costs(figure, near, middle), costs(figure, middle, narrow)) for figure in ("s_per_token", "ttft_s")
    )
    verdict, of_prompt = (_costlier(latency / bandwidth) for latency, bandwidth in (token, prompt))
    if of_prompt != verdict:
        verdict = f"{verdict} for tokens, {of_prompt} for a prompt"
    extremes = [
        f"{times(costs('s_per_token', *ends))} and {times(costs('ttft_s', *ends))} times"
        for ends in ((near, far), (wide, narrow))
    ]
    return verdict, (
        "TinyLlama's shape, four devices, with the star: 6.7 times the latency (0.3 to 2 ms, at 300 Mbit/s) takes "
        f"{times(token[0])} times as long for a token and {times(prompt[0])} times for a prompt of 128, a sixth of the "
        f"bandwidth (300 to 50 Mbit/s, at 2 ms) {times(token[1])} and {times(prompt[1])} times; further apart, 33 times the "
        f"latency (0.3 to 10 ms) {extremes[0]}, a twentieth of the bandwidth (1 Gbit/s to 50 Mbit/s) {extremes[1]}"
    )


def _costlier(ratio: float) -> str:
    """The verdict where so many times the latency costs `ratio` times what as little of the bandwidth does."""
    if ratio > 1 + ALIKE_SHARE:
        return "confirmed"
    return "as much as bandwidth" if ratio >= 1 / (1 + ALIKE_SHARE) else "not so"


def _star(found: Sequence[Found]) -> tuple[str, str]:
    said, share = [], []
    rows = [each for each in found if each["experiment"] == "network" and each["measure"] == "allreduce"]
    rows = [each for each in rows if each["devices"] >= 4 and each["bandwidth"]]
    for size, what in ((4096, "a token's sum"), (524288, "a prompt's (128 positions)")):
        best: list[float] = []  # the bandwidths at which the star was fastest
        slower: list[float] = []
        worst, auto, kin = 0.0, 0.0, 0
        for each in rows:
            row = next((row for row in each.figures["rows"] if row["numbers"] == size), None)
            if row is not None:
                took = row["seconds"]
                others = min(took[name] for name in ("ring", "tree", "library"))
                bandwidth = parse_bandwidth(each["bandwidth"], "bandwidth") * 8 / 1e6
                (best if took["star"] <= others else slower).append(bandwidth)
                kin += min(took, key=lambda name: took[name]) in ("exchange", "mesh")
                worst, auto = max(worst, took["star"] / others), max(auto, took[row["auto"]] / others)
        if best or slower:
            share.append(len(best) / len(best + slower))
            below = (
                f", in all of more than {max(slower):g} Mbit/s" if best and slower and min(best) > max(slower) else ""
            )
            said.append(
                f"{what}: faster than ring, tree and library in {len(best)} of {len(best + slower)} networks{below}, "
                f"at worst {times(worst)} times the fastest of these (what `auto` takes: {times(auto)}); its kin, "
                f"`exchange` or `mesh`, is faster than all in {kin}"
            )
    if len(share) < 2:
        return _NOT_MEASURED
    tokens = "" if share[0] > 0.9 else " in most networks"
    verdict = "confirmed" if min(share) > 0.9 else f"confirmed for tokens{tokens}, not so for prompts"
    if share[0] <= 0.5:
        verdict = "not so"
    return verdict, "; ".join([*said, *_whole_runs(found)])


def _whole_runs(found: Sequence[Found]) -> list[str]:
    """How often the star was the fastest of the four in whole runs."""
    four = ("star", "ring", "tree", "library")
    runs = [each for each in by_network(found).values() if each.keys() >= {*four}]

    def fastest(figure: str) -> int:
        return sum(min(four, key=lambda name: each[name].figures[figure]) == "star" for each in runs)

    if not runs:
        return []
    return [
        f"whole runs of a smaller model: a token in {fastest('s_per_token')} of {len(runs)} networks, a prompt in "
        f"{fastest('ttft_s')}"
    ]


def _window(found: Sequence[Found]) -> tuple[str, str]:
    rows = [
        each
        for each in found
        if each["experiment"] == "memory" and each["program"] == "tpimpi" and each["format"] == "q4_0" and each["read"]
    ]
    pinned = [each.figures["s_per_token"] for each in rows if not sum(each.figures["streamed_bytes_per_token"])]
    if not pinned:
        return _NOT_MEASURED
    computing = min(pinned)
    ratios, reading = [], []
    for each in rows:
        line = sum(each.figures["streamed_bytes_per_token"]) / parse_bandwidth(each["read"], "read")
        if line:
            ratios.append((each.figures["s_per_token"] / max(line, computing), each))
            reading.append(line / computing)
    if not ratios:
        return _NOT_MEASURED
    worst, where = max(ratios, key=lambda found: found[0])
    what = where.asked if where["window"] else f"memory {where.asked}"
    hidden = worst <= 1.25
    verdict = "confirmed" if hidden else "worse"
    low, high = min(reading), max(reading)
    longer = " to ".join(dict.fromkeys((times(low), times(high))))
    if high <= 1:
        case = f"reading, which takes up to {times(high)} times as long as computing ({ms(computing)})"
    elif low > 1:
        case = f"computing ({ms(computing)}); reading takes {longer} times as long"
    else:
        case = f"reading or computing ({ms(computing)}): reading takes {longer} times as long"
    if high > 1:
        verdict += ", but what reading takes beyond computing still shows"
        case += ", and what it takes beyond that nothing hides"
    return verdict, (
        f"a token takes {times(min(ratio for ratio, _ in ratios))} to {times(worst)} times the larger of reading and "
        f"computing (worst: {what}): the smaller is {'' if hidden else 'not wholly '}hidden. Here that is {case}"
    )


_CLAIMS: dict[str, Callable[[Sequence[Found]], tuple[str, str]]] = {
    "Four devices against one, 3B in f32: first token 61 → 2.5 s, a token 30 → 2 s (24 and 15 times)": _several_devices,
    "Ours: where memory is short (7B, q4_0, 1 GiB), four devices against one: 12 times a token, 10 times the first": _ours,
    "80 to 90 % less time than the usual offloading systems": _offloading,
    "90 % less peak memory for 70B": _seventy,
    "Link latency, not bandwidth, is what a home network costs": _latency,
    "The star is the right allreduce for it": _star,
    "The window hides the disk": _window,
}

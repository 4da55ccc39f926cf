"""The paper's claims (arXiv 2410.00531), each with what was measured here: confirmed, better, worse, or not so."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from experiment_tables import Found, by_network, mb, ms, per_token, seconds, times
from home_devices import parse_bandwidth

NEAR = 0.9  # of a claimed figure is still that figure, on machines as noisy as these
Claim = tuple[str, str, str]


def claims(found: Sequence[Found]) -> list[Claim]:
    """(claim, verdict, figures) of each claim."""
    return [(text, *judge(found)) for text, judge in _CLAIMS.items()]


_NOT_MEASURED = ("not measured", "")


def _one(found: Sequence[Found], **settings: object) -> Found | None:
    return next((each for each in found if all(each[key] == value for key, value in settings.items())), None)


def _verdict(measured: float, claimed: float) -> str:
    """Of something of which more is better."""
    if measured >= claimed / NEAR:
        return "better"
    return "confirmed" if measured >= claimed * NEAR else "worse" if measured > 1 else "not so"


def _verdict_less(less: float, low: float, high: float) -> str:
    """Of something that is to be less by a share between `low` and `high`: a tenth counts of what is left of it."""
    if 1 - less < (1 - high) * NEAR:
        return "better"
    return "confirmed" if 1 - less <= (1 - low) / NEAR else "worse" if less > 0 else "not so"


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
            verdicts.append(f"{verdict} with {memory} a device")
            said.append(f"{memory}: {_one_against_four(pair)}")
    return (", ".join(verdicts), "; ".join(said)) if said else _NOT_MEASURED


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
    ours = [_one(found, program="tpimpi", format="bf16", devices=devices, **home) for devices in (4, 1)]
    said, least = [], []
    for program in ("accelerate", "airllm"):
        theirs = _one(found, program=program, **home)
        if None not in ours and theirs is not None and "killed" not in theirs.figures:
            token = theirs.figures["s_per_token"]
            four, one = (1 - each.figures["s_per_token"] / token for each in ours if each is not None)
            least.append(four)
            said.append(
                f"{100 * four:.0f} % less than {program} ({per_token(token)} s a token), one device {100 * one:.0f} %"
            )
    if not least or ours[0] is None:
        return _NOT_MEASURED
    quantized = _one(found, program="tpimpi", format="q4_0", devices=4, **home)
    small = "" if quantized is None else f"; in q4_0 {per_token(quantized.figures['s_per_token'])} s a token"
    return (
        _verdict_less(min(least), 0.8, 0.9),
        f"7B in bf16, four devices, {per_token(ours[0].figures['s_per_token'])} s a token: {'; '.join(said)}{small}",
    )


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
    wanted = [("0.3ms", "300Mbit/s"), ("10ms", "300Mbit/s"), ("2ms", "1Gbit/s"), ("2ms", "50Mbit/s")]
    if any(key not in at for key in wanted):
        return _NOT_MEASURED
    near, far, wide, narrow = (at[key] for key in wanted)
    latency, bandwidth = (b["s_per_token"] / a["s_per_token"] for a, b in ((near, far), (wide, narrow)))
    prompt = [b["ttft_s"] / a["ttft_s"] for a, b in ((near, far), (wide, narrow))]
    verdict = "confirmed" if latency > bandwidth else "not so"
    if prompt[1] > prompt[0]:
        verdict += " for tokens, not so for a prompt"
    return verdict, (
        "TinyLlama's shape, four devices, with the star: 33 times the latency (0.3 to 10 ms, at 300 Mbit/s) takes "
        f"{times(latency)} times as long for a token and {times(prompt[0])} times for a prompt of 128; a twentieth of the "
        f"bandwidth (1 Gbit/s to 50 Mbit/s, at 2 ms) {times(bandwidth)} and {times(prompt[1])} times"
    )


def _star(found: Sequence[Found]) -> tuple[str, str]:
    said, share = [], []
    rows = [each for each in found if each["experiment"] == "network" and each["measure"] == "allreduce"]
    rows = [each for each in rows if each["devices"] >= 4]
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
        if each["experiment"] == "memory" and each["program"] == "tpimpi" and each["format"] == "q4_0"
    ]
    pinned = [each.figures["s_per_token"] for each in rows if not sum(each.figures["streamed_bytes_per_token"])]
    ratios = []
    for each in rows:
        line = sum(each.figures["streamed_bytes_per_token"]) / parse_bandwidth(each["read"], "read")
        if pinned and line:
            ratios.append((each.figures["s_per_token"] / max(line, min(pinned)), each, line))
    if not ratios:
        return _NOT_MEASURED
    worst, where, _ = max(ratios, key=lambda found: found[0])
    what = f"window {where['window']}" if where["window"] else f"memory {where['budget']}"
    verdict = "confirmed" if worst <= 1.25 else "worse"
    longer = max(line for *_, line in ratios) / min(pinned)
    if longer > 1:
        verdict += ", but what reading takes beyond computing still shows"
    return verdict, (
        f"a token takes {times(min(ratio for ratio, *_ in ratios))} to {times(worst)} times the larger of reading and "
        f"computing (worst: {what}): the smaller is hidden. Here that is computing ({ms(min(pinned))}); reading takes up "
        f"to {times(longer)} times as long, and nothing hides it"
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

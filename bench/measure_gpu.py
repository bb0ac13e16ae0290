"""What one GPU draws and takes, at the clocks that it chooses itself: nothing is set, only read.

    python bench/measure_gpu.py OUT                  # about ten minutes on one idle GPU
    python bench/measure_gpu.py OUT --rehearse       # the same plan on a made-up GPU, without one
    python bench/measure_gpu.py OUT --compare        # measured beside predicted, once it is done

Needs torch with CUDA and `nvidia-ml-py`; no serving engine, no weights (random ones in the shapes
of Llama-3.1-8B). Predictions of a profile are written to OUT/predicted.json before the first
measurement. Every step is a line of OUT/steps.jsonl as soon as it is done, and is not run again:
interrupted, the same command goes on. OUT/table.csv has the columns that `voltana-ctrl fit` reads,
with the SM clock that the driver chose.

Steps: (1) idle watts and clocks without a context, with one, with 16 GB resident, and after work;
(2) the energy counter: its period, by square waves of 20 to 500 ms; (3) decode, CUDA graph and
eager, by batch and context; (4) prefill by tokens; (5) decode with gaps of the host; (6) matrix
products up to the power cap: clock, watts, speed and temperature as the driver lowers the clock by
itself; (7) copies of a KV cache, alone and with decode beside them.
"""

import argparse
import csv
import json
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

BATCHES = (1, 2, 4, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256)
CONTEXTS_TOK = (256, 1024, 4096)
PROMPTS_TOK = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
GAPS_S = (0.0, 0.0005, 0.001, 0.002, 0.005)
WAVES_S = (0.02, 0.05, 0.1, 0.2, 0.5)
#: Llama-3.1-8B: layers, width, feed-forward width, heads, heads of KV, width of a head.
LAYERS, WIDTH, INNER, HEADS, KV_HEADS, HEAD = 32, 4096, 14336, 32, 8, 128
PROFILE = "h100-sxm-80gb/llama-3.1-8b"
LEAST_S = 2.0
COLUMNS = ("phase", "freq_mhz", "batch_req", "kv_tok", "prefill_tok", "wall_s", "energy_j", "graph")


def plan():
    """Every step by name, in order."""
    steps = [("idle", {"state": state}) for state in ("bare", "context", "resident", "decay")]
    steps += [("wave", {"half_s": half_s}) for half_s in WAVES_S]
    steps += [
        ("decode", {"batch_req": n, "context_tok": c, "graph": graph})
        for graph in (True, False)
        for c in CONTEXTS_TOK
        for n in BATCHES
        if n * c <= 400_000 and (graph or n in (1, 8, 32, 128))
    ]
    steps += [("prefill", {"prefill_tok": tok}) for tok in PROMPTS_TOK]
    steps += [("gap", {"batch_req": 16, "context_tok": 1024, "gap_s": gap_s}) for gap_s in GAPS_S]
    steps += [("product", {"size": size}) for size in (1024, 2048, 4096, 8192, 16384)]
    steps += [("copy", {"gigabytes": size, "beside": beside})
              for size in (0.25, 1.0) for beside in (False, True)]  # fmt: skip
    return [(f"{kind}:" + ",".join(f"{k}={v}" for k, v in how.items()), kind, how)
            for kind, how in steps]  # fmt: skip


def predictions():
    """What the shipped profile says of every step that it knows, at the highest clock."""
    from voltana_ctrl import load_profile
    from voltana_ctrl.laws import decode_j, decode_s, prefill_j, prefill_s

    profile = load_profile(PROFILE)
    row, padded = profile.table[-1], profile.padded_batch()
    found = {}
    for name, kind, how in plan():
        if kind == "decode" and how["graph"]:
            n, kv_tok = how["batch_req"], how["batch_req"] * how["context_tok"]
            wall_s = float(decode_s(row, n, kv_tok, padded[n]))
            energy_j = float(decode_j(row, n, kv_tok, padded[n]))
        elif kind == "prefill":
            wall_s, energy_j = (
                float(law(row, how["prefill_tok"])) for law in (prefill_s, prefill_j)
            )
        elif kind == "idle" and how["state"] == "resident":
            wall_s, energy_j = 1.0, profile.idle_w
        else:
            continue
        found[name] = {"wall_s": wall_s, "power_w": energy_j / wall_s}
    return {"profile": PROFILE, "status": profile.status, "steps": found}


class Real:
    """The GPU that is there, by torch and NVML; only getters of the driver are called."""

    def __init__(self):
        import pynvml

        self.nvml = pynvml
        pynvml.nvmlInit()
        self.gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
        self.torch = self.kept = self.model = None

    def energy_j(self):
        return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.gpu) / 1e3

    def clock_mhz(self):
        return float(self.nvml.nvmlDeviceGetClockInfo(self.gpu, self.nvml.NVML_CLOCK_SM))

    def celsius(self):
        return float(self.nvml.nvmlDeviceGetTemperature(self.gpu, self.nvml.NVML_TEMPERATURE_GPU))

    def now_s(self):
        return time.perf_counter()

    def rest(self, span_s):
        time.sleep(span_s)

    def describe(self):
        return {
            "gpu": str(self.nvml.nvmlDeviceGetName(self.gpu)),
            "driver": str(self.nvml.nvmlSystemGetDriverVersion()),
            "power_limit_w": self.nvml.nvmlDeviceGetEnforcedPowerLimit(self.gpu) / 1e3,
        }

    def context(self, gigabytes=0.0):
        if self.torch is None:
            import torch

            self.torch = torch
            torch.zeros(1, device="cuda")
        if gigabytes:
            self.kept = self.torch.empty(int(gigabytes * 2**29), dtype=self.torch.bfloat16,
                                         device="cuda")  # fmt: skip

    def wait(self):
        self.torch.cuda.synchronize()

    def _weights(self):
        self.kept = None
        self.context()
        if self.model is None:
            torch = self.torch

            def matrix(rows, columns):
                return torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda") * 0.02

            qkv = WIDTH + 2 * KV_HEADS * HEAD
            self.model = [
                (matrix(WIDTH, qkv), matrix(WIDTH, WIDTH), matrix(WIDTH, 2 * INNER),
                 matrix(INNER, WIDTH)) for _ in range(LAYERS)
            ]  # fmt: skip
        return self.model

    def step(self, kind, how):
        """A function that starts one iteration, without waiting for it."""
        torch = self.torch or (self.context() or self.torch)
        if kind == "product":
            one = torch.randn(how["size"], how["size"], dtype=torch.bfloat16, device="cuda")
            return lambda: torch.matmul(one, one)
        if kind == "copy":
            size = int(how["gigabytes"] * 2**29)
            source = torch.empty(size, dtype=torch.bfloat16, device="cuda")
            target = torch.empty_like(source)
            if not how["beside"]:
                return lambda: target.copy_(source)
            decode = self.step("decode", {"batch_req": 16, "context_tok": 1024, "graph": True})
            stream = torch.cuda.Stream()

            def both():
                with torch.cuda.stream(stream):
                    target.copy_(source)
                decode()

            return both
        weights, functional = self._weights(), torch.nn.functional
        prefill = kind == "prefill"
        n = 1 if prefill else how["batch_req"]
        rows = how["prefill_tok"] if prefill else n
        x = torch.randn(rows, WIDTH, dtype=torch.bfloat16, device="cuda")
        context = rows if prefill else how["context_tok"]
        cache = torch.randn(2, n, KV_HEADS, context, HEAD, dtype=torch.bfloat16, device="cuda")

        def layers():
            y = x
            for qkv, out, up, down in weights:
                q = (y @ qkv)[:, :WIDTH].view(n, -1, HEADS, HEAD).transpose(1, 2)
                seen = functional.scaled_dot_product_attention(
                    q, cache[0], cache[1], is_causal=prefill, enable_gqa=True
                )
                y = y + seen.transpose(1, 2).reshape(rows, WIDTH) @ out
                gate, value = (y @ up).chunk(2, dim=-1)
                y = y + (functional.silu(gate) * value) @ down
            return y

        if prefill or not how.get("graph", True):
            return layers
        side = torch.cuda.Stream()
        with torch.cuda.stream(side), torch.no_grad():
            for _ in range(3):
                layers()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            layers()
        return graph.replay


class Rehearsed:
    """A made-up GPU with a clock of its own, so that the plan runs anywhere."""

    def __init__(self):
        self.t_s = self.used_j = 0.0
        self.resting_w = 60.0

    def energy_j(self):
        return self.used_j

    def clock_mhz(self):
        return 1980.0

    def celsius(self):
        return 40.0

    def now_s(self):
        return self.t_s

    def rest(self, span_s):
        self.t_s += span_s
        self.used_j += self.resting_w * span_s

    def describe(self):
        return {"gpu": "rehearsal", "driver": "none", "power_limit_w": 700.0}

    def context(self, gigabytes=0.0):
        self.resting_w = 100.0 + gigabytes / 10.0

    def wait(self):
        pass

    def step(self, kind, how):
        n = how.get("batch_req", 16)
        if kind == "prefill":
            time_s, power_w = 5e-3 + 2.2e-5 * how["prefill_tok"], 620.0
        elif kind == "product":
            time_s, power_w = 2e-15 * how["size"] ** 3 + 1e-5, 690.0
        elif kind == "copy":
            time_s, power_w = 1e-3 * how["gigabytes"], 300.0
        else:
            time_s = 6.7e-3 + 5e-5 * n + 4e-8 * n * how.get("context_tok", 1024)
            power_w = 440.0 + n / 2.0

        def run():
            self.t_s += time_s
            self.used_j += power_w * time_s

        return run


def busy(gpu, run, span_s, gap_s=0.0):
    """Repeat for a while: time and energy of one, clock, temperature."""
    for _ in range(3):
        run()
    gpu.wait()
    clocks, count = [], 0
    begin_s, begin_j = gpu.now_s(), gpu.energy_j()
    while gpu.now_s() - begin_s < span_s:
        run()
        count += 1
        if gap_s or count % 16 == 0:
            gpu.wait()
            clocks.append(gpu.clock_mhz())
        if gap_s:
            gpu.rest(gap_s)
    gpu.wait()
    wall_s = (gpu.now_s() - begin_s) / count
    return {
        "wall_s": wall_s, "energy_j": (gpu.energy_j() - begin_j) / count, "count": count,
        "freq_mhz": statistics.median(clocks or [gpu.clock_mhz()]), "celsius": gpu.celsius(),
    }  # fmt: skip


def measure(gpu, kind, how):
    """One step."""
    if kind == "idle":
        if how["state"] != "bare":
            gpu.context(16.0 if how["state"] in ("resident", "decay") else 0.0)
        if how["state"] == "decay":
            busy(gpu, gpu.step("product", {"size": 4096}), LEAST_S)
        seconds = []
        for _ in range(10):
            begin_s, begin_j = gpu.now_s(), gpu.energy_j()
            gpu.rest(1.0)
            seconds.append((gpu.energy_j() - begin_j) / (gpu.now_s() - begin_s))
        return {
            "power_w": statistics.median(seconds), "by_second_w": seconds,
            "freq_mhz": gpu.clock_mhz(), "wall_s": 1.0, "energy_j": statistics.median(seconds),
        }  # fmt: skip
    if kind == "wave":
        return _wave(gpu, how["half_s"])
    return busy(gpu, gpu.step(kind, how), LEAST_S, how.get("gap_s", 0.0))


def _wave(gpu, half_s):
    """Work and rest in turn; when the counter moves, and by how much."""
    run = gpu.step("product", {"size": 4096})
    changes, last_j, begin_s = [], gpu.energy_j(), gpu.now_s()
    while gpu.now_s() - begin_s < 4.0:
        edge_s = gpu.now_s()
        while gpu.now_s() - edge_s < half_s:
            run()
            gpu.wait()
            now_j = gpu.energy_j()
            if now_j != last_j:
                changes.append((gpu.now_s() - begin_s, now_j - last_j))
                last_j = now_j
        gpu.rest(half_s)
    gaps = [after[0] - before[0] for before, after in pairwise(changes)]
    return {
        "counter_period_s": min(gaps, default=None), "readings": len(changes),
        "mean_w": (gpu.energy_j() - last_j + sum(j for _, j in changes)) / (gpu.now_s() - begin_s),
    }  # fmt: skip


def carry_out(gpu, folder):
    """Every step that is not there yet; each is kept as soon as it is done."""
    folder.mkdir(parents=True, exist_ok=True)
    said = folder / "predicted.json"
    if not said.exists():
        said.write_text(json.dumps(predictions(), indent=1), encoding="utf-8")
    kept = read_steps(folder)
    path = folder / "steps.jsonl"
    cut_off = path.exists() and not path.read_text(encoding="utf-8").endswith("\n")
    with path.open("a", encoding="utf-8") as out:
        if cut_off:
            out.write("\n")
        if not kept:
            out.write(json.dumps({"step": "gpu", **gpu.describe()}) + "\n")
        for name, kind, how in plan():
            if name in kept:
                continue
            try:
                found = measure(gpu, kind, how)
            except (RuntimeError, MemoryError) as error:  # one shape that does not fit ends nothing
                found = {"error": f"{type(error).__name__}: {error}"[:200]}
            out.write(json.dumps({"step": name, "kind": kind, **how, **found}) + "\n")
            out.flush()
    write_table(folder)


def read_steps(folder):
    """Steps by name; a line that was cut off by an interruption is not there."""
    path, found = folder / "steps.jsonl", {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[row["step"]] = row
    return found


def write_table(folder):
    """Rows in the columns of ``voltana-ctrl fit``."""
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as out:
        table = csv.DictWriter(out, COLUMNS, extrasaction="ignore")
        table.writeheader()
        for row in read_steps(folder).values():
            phase = row.get("kind")
            if phase not in ("idle", "decode", "prefill") or "wall_s" not in row:
                continue
            n = row.get("batch_req", int(phase == "prefill"))
            table.writerow(
                {**row, "phase": phase, "batch_req": n, "kv_tok": n * row.get("context_tok", 0),
                 "prefill_tok": row.get("prefill_tok", 0), "graph": row.get("graph", "")}
            )  # fmt: skip


def compared(folder):
    """Lines of a table: measured beside predicted."""
    said = json.loads((folder / "predicted.json").read_text(encoding="utf-8"))["steps"]
    lines = [
        "| step | ms measured | / predicted | W measured | / predicted |",
        "|---|---|---|---|---|",
    ]
    for name, row in read_steps(folder).items():
        if name in said and "wall_s" in row:
            power_w = row["energy_j"] / row["wall_s"]
            lines.append(
                f"| {name} | {1e3 * row['wall_s']:.2f} | {row['wall_s'] / said[name]['wall_s']:.2f}"
                f" | {power_w:.0f} | {power_w / said[name]['power_w']:.2f} |"
            )
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="a made-up GPU")
    parser.add_argument("--compare", action="store_true", help="measured beside predicted")
    options = parser.parse_args()
    if options.compare:
        print("\n".join(compared(options.folder)))
        return 0
    carry_out(Rehearsed() if options.rehearse else Real(), options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The plan's problem as a do-mpc controller, for the comparison in bench_control."""

import casadi as ca
import do_mpc
import numpy as np


def controller(planner):
    """The same dynamics, rules and cost at the planner's present parameters, and its start.

    The parameters are constants here, which spares do-mpc what a tick costs the planner.
    """
    d = {name: planner.values[each.id] for name, each in planner._d.items()}
    p = {name: planner.values[each.id] for name, each in planner._p.items()}
    prompts, requests = planner.values[planner._arrivals.id]
    prefill, decode = planner._slots
    n_d, n_p, dt = len(decode), len(prefill), planner.dt_s
    part = 1.0 - planner.delay_s / dt
    states = {"n": n_d, "m": n_d, "q": n_p, "f_before": n_d, "cap_before": n_p}
    inputs = {"f": n_d, "lam": n_d, "late": n_d, "full": n_d}
    inputs |= {"cap": n_p, "mu": n_p, "rate": n_p, "busy_w": n_p, "slow": n_p}

    def after(x, u):
        """Next states, the clock and the rate that run, power."""
        clock = part * u["f"] + (1.0 - part) * x["f_before"]
        able = part * u["cap"] + (1.0 - part) * x["cap_before"]
        n = d["a_nn"] * x["n"] + d["a_nm"] * x["m"] + d["b_n"] * clock + d["e_n"] * u["lam"]
        m = d["a_mn"] * x["n"] + d["a_mm"] * x["m"] + d["b_m"] * clock + d["e_m"] * u["lam"]
        drawn_w = ca.dot(d["power_n"], x["n"]) + ca.dot(d["power_f"], clock)
        drawn_w += ca.dot(p["size"], u["busy_w"]) + float(d["power_rest_w"].sum())
        following = {"n": n + d["c_n"], "m": m + d["c_m"], "q": x["q"] + dt * (u["rate"] - u["mu"])}
        return following | {"f_before": u["f"], "cap_before": u["cap"]}, clock, able, drawn_w

    model = do_mpc.model.Model("discrete")
    x = {name: model.set_variable("_x", name, (size, 1)) for name, size in states.items()}
    u = {name: model.set_variable("_u", name, (size, 1)) for name, size in inputs.items()}
    for name, value in after(x, u)[0].items():
        model.set_rhs(name, value)
    model.setup()
    mpc = do_mpc.controller.MPC(model)
    mpc.settings.n_horizon, mpc.settings.t_step = planner.horizon, dt
    mpc.settings.store_full_solution = False
    mpc.settings.supress_ipopt_output()
    x = {name: model.x[name] for name in states}
    u = {name: model.u[name] for name in inputs}
    following, clock, able, drawn_w = after(x, u)
    cost = dt * (
        drawn_w
        + 1e5 * ca.sum1(u["late"])
        + 100.0 * ca.sum1(u["full"])
        + 1e3 * ca.sum1(u["slow"])
        + 0.5 * ca.sum1(u["cap"])
        - 0.04 * (ca.dot(d["lam_goal"], u["lam"]) + ca.dot(p["rate_goal"], u["rate"]))
        - 10.0 * ca.dot(d["f_goal"], u["f"])
        + 0.02 * (ca.sumsqr(u["lam"]) + ca.sumsqr(u["rate"]))
        + 5.0 * ca.sumsqr(u["f"])
        + 0.05 * (ca.sumsqr(u["mu"]) + ca.sumsqr(u["cap"]))
    )
    end = 0.01 * (ca.sumsqr(x["n"]) - 2.0 * ca.dot(d["n_goal"], x["n"]))
    mpc.set_objective(mterm=end + 10.0 * ca.sumsqr(x["q"]), lterm=cost)
    mpc.set_rterm(**dict.fromkeys(inputs, 0.0))
    step_s = d["step_n"] * following["n"] + d["step_m"] * following["m"] + d["step_f"] * clock
    sent, placed = ca.dot(p["size"], u["rate"]), ca.dot(d["size"], u["lam"])
    rules = {
        "late": step_s - d["step_rest_s"] - u["late"],
        "full": following["m"] - d["kv_ktok"] - u["full"],
        "slow": following["q"] - able * planner.ttft_s - u["slow"],
        "able": u["mu"] - able,
        "slew": x["f_before"] - planner.slew_ghz - u["f"],
        "budget": drawn_w - float(planner.values[planner._budget_w.id]),
        "sent": ca.vertcat(sent - prompts, prompts - sent),
        "placed": ca.vertcat(placed - requests, requests - placed),
    }
    for row, (slope, start) in enumerate(prefill.facets):
        rules[f"facet{row}"] = slope * u["mu"] + start - u["busy_w"]
    for name, rule in rules.items():
        mpc.set_nl_cons(name, rule, ub=0.0)
    limits = dict.fromkeys(("lam", "late", "full", "slow", "mu", "rate"), (0.0, np.inf))
    limits |= {"lam": (0.0, d["lam_max"]), "rate": (0.0, p["rate_max"])}
    limits |= {"f": decode.clock_ghz, "cap": (prefill.rate_min, prefill.rate_max)}
    for name, (low, high) in limits.items():
        mpc.bounds["lower", "_u", name], mpc.bounds["upper", "_u", name] = low, high
    mpc.bounds["lower", "_x", "q"] = 0.0
    mpc.setup()
    first = np.concatenate([d["n0"], d["m0"], p["q0"], d["f0"], p["cap0"]])[:, None]
    mpc.x0 = first
    mpc.set_initial_guess()
    return mpc, first

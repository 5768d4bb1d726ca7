"""From a load and a topology to a placement.

`planner.plan` is the entrance: it checks, leaves out dead ranks, forecasts, completes the placement in force,
asks a policy, and applies the skip rule. `policies` names the policies: `adaptive`, `ensemble` and `greedy`,
one file each. The compiled search is in `kernels/`. All of it is pure: the same input gives the same plan on
every rank.
"""

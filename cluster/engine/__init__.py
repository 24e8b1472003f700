"""One attention worker: which tokens a step computes, the step itself, and what becomes of it."""

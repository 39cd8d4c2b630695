"""From a planned step to arrays: jobs, worker processes and the buffers they write to."""

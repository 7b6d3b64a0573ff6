"""The row form on a GPU: Triton kernels with the results of `workers.row_form`, for serving (they have no backward)."""

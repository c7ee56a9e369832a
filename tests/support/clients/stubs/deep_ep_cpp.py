"""The names of sgl-kernel-npu's extension module, for its modes that use torch_npu instead."""


class Config:
    """Settings of the extension's kernels."""

    def __init__(self, *_):
        pass


class EventHandle:
    """An event of the extension; here all work is complete."""

    def current_stream_wait(self):
        """Nothing to wait for."""


class Buffer:
    """The extension's state, whose kernels are not here."""

    def __init__(self, *_):
        pass

    def get_num_rdma_ranks(self):
        """All ranks are on one machine."""
        return 1


def get_low_latency_rdma_size_hint(*_):
    """No memory is set aside."""
    return 0

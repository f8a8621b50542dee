"""Arguments of convolutions, for hypothesis to draw from."""

from hypothesis import strategies as st

layers_on_small_images = st.builds(
    dict,
    kernel_size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
)
few_pixels = st.integers(1, 4)  # height or width

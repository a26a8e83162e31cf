// SPDX-License-Identifier: MIT OR Apache-2.0

//! Tests of pinbuf that need no guest: one file for each theme, in `tests/`.

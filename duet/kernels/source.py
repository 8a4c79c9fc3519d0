# type: ignore
"""The kernels in Triton, for CUDA and ROCm alike. Without Triton this module is empty; ``launch`` calls them.

Attention is never stored: a first pass keeps the log of each row's sum of exponentials, a second one adds up columns.
No kernel adds into memory that another program writes, so results do not depend on the order of programs.

Names: B batch, H query heads, K key heads of G query heads each, R rows, N keys or tokens, d head width, D width. Rows
of one key head are numbered g * R + r. UPCAST multiplies in fp32 what is stored in bf16: Triton's interpreter has no
products of bf16.
"""

import importlib.util

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def _key_tile(key, cos, sin, n, ok, dims, stride_n, stride_cos, d, WIDTH: tl.constexpr):
        """Load keys [n, d]; rotate their first WIDTH dimensions, rounding where PyTorch rounds."""
        mask = ok[:, None] & (dims < d)[None, :]
        x = tl.load(key + n[:, None] * stride_n + dims[None, :], mask=mask, other=0.0)
        if WIDTH > 0:
            HALF: tl.constexpr = WIDTH // 2
            turned = ok[:, None] & (dims < WIDTH)[None, :]
            partner = tl.where(dims < HALF, dims + HALF, dims - HALF)
            other = tl.load(key + n[:, None] * stride_n + partner[None, :], mask=turned, other=0.0).to(tl.float32)
            other = tl.where((dims < HALF)[None, :], -other, other)
            c = tl.load(cos + n[:, None] * stride_cos + dims[None, :], mask=turned, other=0.0).to(tl.float32)
            s = tl.load(sin + n[:, None] * stride_cos + dims[None, :], mask=turned, other=0.0).to(tl.float32)
            straight = (x.to(tl.float32) * c).to(x.dtype).to(tl.float32)
            crossed = (other * s).to(x.dtype).to(tl.float32)
            x = tl.where(turned, (straight + crossed).to(x.dtype), x)
        return x

    @triton.jit
    def _query_tile(query, m, ok, dims, stride_h, stride_r, R, d):
        """Load query rows g * R + r of one key head, [m, d]."""
        start = (m // R) * stride_h + (m % R) * stride_r
        return tl.load(query + start[:, None] + dims[None, :], mask=ok[:, None] & (dims < d)[None, :], other=0.0)

    @triton.jit
    def _scores(q, k, scale, UPCAST: tl.constexpr):
        if UPCAST:
            q, k = q.to(tl.float32), k.to(tl.float32)
        return tl.dot(q, tl.trans(k), input_precision="ieee") * scale

    @triton.jit
    def _edges(start, stop, at, row_ok, N, HAS_START: tl.constexpr, HAS_STOP: tl.constexpr):
        """Load between which keys each row looks; a row that is none looks nowhere."""
        first = tl.where(row_ok, 0, N)
        last = tl.where(row_ok, N, 0)
        if HAS_START:
            first = tl.load(start + at, mask=row_ok, other=N)
        if HAS_STOP:
            last = tl.minimum(tl.load(stop + at, mask=row_ok, other=0), N)
        return first, last

    @triton.jit
    def _seen(first, last, valid, n, key_ok, HAS_VALID: tl.constexpr):
        """Which keys each row may see, [m, n]."""
        seen = key_ok[None, :] & (n[None, :] >= first[:, None]) & (n[None, :] < last[:, None])
        if HAS_VALID:
            seen = seen & (tl.load(valid + n, mask=key_ok, other=0) != 0)[None, :]
        return seen

    @triton.jit
    def row_lse(
        query, key, cos, sin, start, stop, valid, lse, scale, R, N, d, rows,
        stride_qb, stride_qh, stride_qr, stride_kb, stride_kh, stride_kn, stride_cos_b, stride_cos_n, stride_span,
        G: tl.constexpr, WIDTH: tl.constexpr, HAS_START: tl.constexpr, HAS_STOP: tl.constexpr, HAS_VALID: tl.constexpr,
        UPCAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """Write lse [B, K, G * R]: the log of each row's sum of exponentials, infinite where it may see nothing."""
        b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
        m = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        row_ok = m < rows
        dims = tl.arange(0, BLOCK_D)
        q = _query_tile(query + b * stride_qb + h * G * stride_qh, m, row_ok, dims, stride_qh, stride_qr, R, d)
        key += b * stride_kb + h * stride_kh
        cos += b * stride_cos_b
        sin += b * stride_cos_b
        valid += b * N
        first, last = _edges(start, stop, b * stride_span + m % R, row_ok, N, HAS_START, HAS_STOP)
        top = tl.full([BLOCK_R], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_R], tl.float32)
        for at in range(tl.min(first, 0) // BLOCK_N * BLOCK_N, tl.max(last, 0), BLOCK_N):
            n = at + tl.arange(0, BLOCK_N)
            key_ok = n < N
            seen = _seen(first, last, valid, n, key_ok, HAS_VALID)
            k = _key_tile(key, cos, sin, n, key_ok, dims, stride_kn, stride_cos_n, d, WIDTH)
            s = tl.where(seen, _scores(q, k, scale, UPCAST), float("-inf"))
            new = tl.maximum(top, tl.max(s, 1))
            safe = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp(top - safe) + tl.sum(tl.exp(s - safe[:, None]), 1)
            top = new
        out = tl.where(total > 0.0, top + tl.log(tl.where(total > 0.0, total, 1.0)), float("inf"))
        tl.store(lse + (b * tl.num_programs(1) + h) * rows + m, out, mask=row_ok)

    @triton.jit
    def column_sums(
        query, key, cos, sin, start, stop, valid, weight, lse, out, scale, R, N, d, rows,
        stride_qb, stride_qh, stride_qr, stride_kb, stride_kh, stride_kn, stride_cos_b, stride_cos_n, stride_span,
        G: tl.constexpr, WIDTH: tl.constexpr, HAS_START: tl.constexpr, HAS_STOP: tl.constexpr, HAS_VALID: tl.constexpr,
        HAS_WEIGHT: tl.constexpr, UPCAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """Write out [B, K, N]: each key's attention, summed over the weighted rows of one key head."""
        b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
        low = tl.program_id(0) * BLOCK_N
        n = low + tl.arange(0, BLOCK_N)
        key_ok = n < N
        dims = tl.arange(0, BLOCK_D)
        query += b * stride_qb + h * G * stride_qh
        valid += b * N
        lse += (b * tl.num_programs(1) + h) * rows
        k = _key_tile(
            key + b * stride_kb + h * stride_kh, cos + b * stride_cos_b, sin + b * stride_cos_b, n, key_ok, dims,
            stride_kn, stride_cos_n, d, WIDTH,
        )  # fmt: skip
        total = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
        for at in range(0, rows, BLOCK_R):
            m = at + tl.arange(0, BLOCK_R)
            row_ok = m < rows
            level = tl.load(lse + m, mask=row_ok, other=0.0)
            blind = row_ok & (level == float("inf"))
            first, last = _edges(start, stop, b * stride_span + m % R, row_ok, N, HAS_START, HAS_STOP)
            meets = (tl.min(first, 0) < low + BLOCK_N) & (tl.max(last, 0) > low)
            if meets | (tl.max(blind.to(tl.int32), 0) > 0):
                q = _query_tile(query, m, row_ok, dims, stride_qh, stride_qr, R, d)
                s = _scores(q, k, scale, UPCAST)
                seen = _seen(first, last, valid, n, key_ok, HAS_VALID)
                p = tl.where(seen, tl.exp(s - level[:, None]), 0.0)
                p = tl.where(blind[:, None], 1.0 / N, p)
                if HAS_WEIGHT:
                    p *= tl.load(weight + b * R + m % R, mask=row_ok, other=0.0)[:, None]
                total += p
        tl.store(out + (b * tl.num_programs(1) + h) * N + n, tl.sum(total, 0), mask=key_ok)

    @triton.jit
    def gather_rows(
        index, tables, table_outs, table_strides, columns, column_outs, column_strides, K,
        WIDTHS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
    ):  # fmt: skip
        """Copy the rows of tables [B, N, W] and of columns [B, N] that index [B, K] names, to [B, K, W] and [B, K]."""
        b = tl.program_id(2).to(tl.int64)
        k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
        ok = k < K
        row = tl.load(index + b * K + k, mask=ok, other=0)
        w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
        for i in tl.static_range(len(tables)):
            mask = ok[:, None] & (w < WIDTHS[i])[None, :]
            at = b * table_strides[2 * i] + row[:, None] * table_strides[2 * i + 1] + w[None, :]
            to = (b * K + k)[:, None] * WIDTHS[i] + w[None, :]
            tl.store(table_outs[i] + to, tl.load(tables[i] + at, mask=mask), mask=mask)
        if tl.program_id(1) == 0:
            for i in tl.static_range(len(columns)):
                place = b * column_strides[2 * i] + row * column_strides[2 * i + 1]
                tl.store(column_outs[i] + b * K + k, tl.load(columns[i] + place, mask=ok), mask=ok)

    @triton.jit
    def cluster_means(
        x, members, out, stride_b, stride_n, C, D, W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr
    ):
        """Write out [B, C, D], the mean of the W rows of x [B, N, D] that members [B, C, W] names."""
        b = tl.program_id(2).to(tl.int64)
        c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        ok = c < C
        mask = ok[:, None] & (dims < D)[None, :]
        total = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        for i in range(W):
            row = tl.load(members + (b * C + c) * W + i, mask=ok, other=0)
            total += tl.load(x + b * stride_b + row[:, None] * stride_n + dims[None, :], mask=mask, other=0.0).to(
                tl.float32
            )
        mean = (total / W).to(out.dtype.element_ty)
        tl.store(out + (b * C + c)[:, None] * D + dims[None, :], mean, mask=mask)

    @triton.jit
    def cluster_means_backward(
        grad_out, members, grad_x, N, C, D, W: tl.constexpr, UPCAST: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """Write grad_x [B, N, D] from grad_out [B, C, D]: a row gets the share of every cluster that it is in."""
        b = tl.program_id(2).to(tl.int64)
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for at in range(0, C, BLOCK_C):
            c = at + tl.arange(0, BLOCK_C)
            ok = c < C
            times = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
            for i in range(W):
                row = tl.load(members + (b * C + c) * W + i, mask=ok, other=-1)
                times += (n[:, None] == row[None, :]).to(tl.float32)
            mask = ok[:, None] & (dims < D)[None, :]
            grad = tl.load(grad_out + (b * C + c)[:, None] * D + dims[None, :], mask=mask, other=0.0)
            if UPCAST:
                grad = grad.to(tl.float32)
            total += tl.dot(times.to(grad.dtype), grad, input_precision="ieee")
        share = (total / W).to(grad_x.dtype.element_ty)
        keep = (n < N)[:, None] & (dims < D)[None, :]
        tl.store(grad_x + (b * N + n)[:, None] * D + dims[None, :], share, mask=keep)

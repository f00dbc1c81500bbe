"""BLAS has one thread as long as anybody works, since the last digit of a sum depends on it."""

from threadpoolctl import threadpool_info, threadpool_limits

from loratools.work.parallel import in_order, one_blas_thread


def threads():
    return {each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"}


def test_runs_that_overlap_keep_one_thread_until_the_last_has_ended():
    with threadpool_limits(2):
        before = threads()
        first, second = one_blas_thread(), one_blas_thread()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert threads() == {1}
        second.__exit__(None, None, None)
        assert threads() == before


def test_a_run_that_ends_beside_another_leaves_it_one_thread():
    with threadpool_limits(2):
        before = threads()
        outer = in_order(lambda _: threads(), range(6), workers=2)
        seen = [next(outer)]
        assert list(in_order(abs, [-1, -2], workers=2)) == [1, 2]
        seen += outer
        assert seen == [{1}] * 6
        assert threads() == before


def test_a_system_that_starts_no_further_thread_is_told_in_words():
    from loratools.cli.errors import describe

    told = describe(RuntimeError("can't start new thread"))
    assert "ulimit -u" in told
    assert "--traceback" not in told

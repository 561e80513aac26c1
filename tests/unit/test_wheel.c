#include "base/wheel.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

#define N_TIMERS 400
#define DAY_MS   (UINT64_C(24) * 3600 * 1000)

/* For inner loops: ck_assert() reports each success to the parent process. */
#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            ck_abort_msg("%s", #condition);                                                                            \
    } while (0)

static struct wheel *wheel;
static uint64_t state;

static uint64_t draw(void)
{
    uint64_t z = state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

static void set_up(void)
{
    state = 42;
    ck_assert_int_eq(wheel_new(&wheel, 1000), 0);
}

static void tear_down(void)
{
    wheel_free(wheel);
}

START_TEST(empty_wheel_has_nothing_due)
{
    ck_assert_ptr_null(wheel_expire(wheel, 5000));
    ck_assert_uint_eq(wheel_next_ms(wheel, 5000), 1000);
}
END_TEST

START_TEST(timer_is_never_early_and_at_most_a_tick_late)
{
    struct wheel_timer timer = {0};
    for (uint64_t at = 1001; at < 3000; at += 7) {
        wheel_set(wheel, &timer, at);
        ck_assert_ptr_null(wheel_expire(wheel, at - 1));
        ck_assert(wheel_timer_is_set(&timer));
        ck_assert_ptr_eq(wheel_expire(wheel, at + WHEEL_TICK_MS), &timer);
        ck_assert(!wheel_timer_is_set(&timer));
        ck_assert_ptr_null(wheel_expire(wheel, at + WHEEL_TICK_MS));
    }
}
END_TEST

START_TEST(time_in_the_past_fires_at_once)
{
    struct wheel_timer timer = {0};
    wheel_expire(wheel, 100000);
    wheel_set(wheel, &timer, 5);
    ck_assert_uint_eq(wheel_next_ms(wheel, 100000), 0);
    ck_assert_ptr_eq(wheel_expire(wheel, 100000), &timer);
}
END_TEST

START_TEST(cancelled_timer_does_not_fire)
{
    struct wheel_timer timers[3] = {0};
    wheel_cancel(wheel, &timers[0]);
    for (size_t i = 0; i < 3; i++)
        wheel_set(wheel, &timers[i], 2000);
    wheel_cancel(wheel, &timers[1]);
    wheel_cancel(wheel, &timers[1]);
    ck_assert_ptr_ne(wheel_expire(wheel, 2000), &timers[1]);
    ck_assert_ptr_ne(wheel_expire(wheel, 2000), &timers[1]);
    ck_assert_ptr_null(wheel_expire(wheel, 2000));
}
END_TEST

START_TEST(due_timer_can_still_be_cancelled)
{
    struct wheel_timer timers[3] = {0};
    for (size_t i = 0; i < 3; i++)
        wheel_set(wheel, &timers[i], 2000);
    struct wheel_timer *first = wheel_expire(wheel, 2000);
    for (size_t i = 0; i < 3; i++)
        if (&timers[i] != first)
            wheel_cancel(wheel, &timers[i]);
    ck_assert_ptr_null(wheel_expire(wheel, 2000));
}
END_TEST

START_TEST(cancelling_the_last_timer_of_a_slot_leaves_nothing_behind)
{
    struct wheel_timer timer = {0};
    for (uint64_t ahead = 4; ahead < 1000 * DAY_MS; ahead *= 3) {
        wheel_set(wheel, &timer, 1000 + ahead);
        wheel_cancel(wheel, &timer);
        ck_assert_uint_eq(wheel_next_ms(wheel, 1000), 1000);
    }
}
END_TEST

START_TEST(setting_a_timer_again_moves_it)
{
    struct wheel_timer timer = {0};
    wheel_set(wheel, &timer, 2000);
    wheel_set(wheel, &timer, 9000);
    ck_assert_ptr_null(wheel_expire(wheel, 8999));
    wheel_set(wheel, &timer, 9100);
    wheel_set(wheel, &timer, 9004);
    ck_assert_ptr_eq(wheel_expire(wheel, 9004), &timer);
}
END_TEST

START_TEST(timers_months_and_centuries_ahead_fire_in_time)
{
    static const uint64_t ahead[] = {DAY_MS, 40 * DAY_MS, 400 * DAY_MS, 400 * 365 * DAY_MS};
    uint64_t at = 1000 + ahead[_i] + 3;
    struct wheel_timer timer = {0};
    wheel_set(wheel, &timer, at);
    for (uint64_t left = ahead[_i]; left > 0; left /= 2) {
        ck_assert_ptr_null(wheel_expire(wheel, at - left));
        ck_assert_uint_lt(wheel_next_ms(wheel, at - left), left + WHEEL_TICK_MS);
    }
    ck_assert_ptr_eq(wheel_expire(wheel, at + WHEEL_TICK_MS), &timer);
}
END_TEST

START_TEST(the_end_of_time_is_a_time)
{
    struct wheel_timer timer = {0};
    wheel_set(wheel, &timer, UINT64_MAX);
    ck_assert_ptr_null(wheel_expire(wheel, 1000000 * DAY_MS));
    ck_assert_uint_eq(wheel_next_ms(wheel, 1000000 * DAY_MS), 1000);
    wheel_cancel(wheel, &timer);
}
END_TEST

START_TEST(a_poll_that_sleeps_as_told_is_in_time)
{
    struct wheel_timer timer = {0};
    uint64_t now = 1000, at = now + 3 * 3600 * 1000 + 1;
    unsigned n_polls = 0;
    wheel_set(wheel, &timer, at);
    while (!wheel_expire(wheel, now)) {
        unsigned sleep_ms = wheel_next_ms(wheel, now);
        CHECK(sleep_ms <= 1000);
        n_polls++;
        now += sleep_ms;
    }
    ck_assert_uint_ge(now, at);
    ck_assert_uint_lt(now, at + WHEEL_TICK_MS);
    ck_assert_uint_lt(n_polls, 3 * 3600 + 10);
}
END_TEST

/* The model: an array of times, looked through in full. */
static struct wheel_timer timers[N_TIMERS];
static uint64_t times[N_TIMERS]; /* 0: not set */

static void expire_and_compare(uint64_t now)
{
    struct wheel_timer *timer;
    while ((timer = wheel_expire(wheel, now))) {
        size_t i = (size_t)(timer - timers);
        CHECK(times[i] != 0);
        CHECK(times[i] <= now);
        times[i] = 0;
    }
    for (size_t i = 0; i < N_TIMERS; i++) {
        CHECK(!times[i] || times[i] + WHEEL_TICK_MS > now);
        CHECK(wheel_timer_is_set(&timers[i]) == (times[i] != 0));
    }
}

static void check_sleep(uint64_t now)
{
    uint64_t first = UINT64_MAX;
    for (size_t i = 0; i < N_TIMERS; i++)
        if (times[i] && times[i] < first)
            first = times[i];
    /* A tick's rounding may lie between. */
    CHECK(first == UINT64_MAX || first >= UINT64_MAX / 2 ||
          now + wheel_next_ms(wheel, now) < (first > now ? first : now) + WHEEL_TICK_MS);
}

START_TEST(random_sets_and_cancels_agree_with_a_plain_list)
{
    uint64_t now = 1000;
    state = 1000 + (uint64_t)_i;
    for (unsigned step = 0; step < 30000; step++) {
        size_t i = draw() % N_TIMERS;
        switch (draw() % 8) {
        case 0:
            wheel_cancel(wheel, &timers[i]);
            times[i] = 0;
            break;
        case 1:
            now += draw() % 8 == 0 ? draw() >> (30 + draw() % 30) : draw() % 20;
            expire_and_compare(now);
            break;
        default:
            times[i] = 1 + draw() % 2 * now + (draw() >> (22 + draw() % 42));
            wheel_set(wheel, &timers[i], times[i]);
        }
        if (step % 16 == 0)
            check_sleep(now);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("wheel");
    TCase *tcase = tcase_create("wheel");
    tcase_add_checked_fixture(tcase, set_up, tear_down);
    tcase_add_test(tcase, empty_wheel_has_nothing_due);
    tcase_add_test(tcase, timer_is_never_early_and_at_most_a_tick_late);
    tcase_add_test(tcase, time_in_the_past_fires_at_once);
    tcase_add_test(tcase, cancelled_timer_does_not_fire);
    tcase_add_test(tcase, due_timer_can_still_be_cancelled);
    tcase_add_test(tcase, cancelling_the_last_timer_of_a_slot_leaves_nothing_behind);
    tcase_add_test(tcase, setting_a_timer_again_moves_it);
    tcase_add_loop_test(tcase, timers_months_and_centuries_ahead_fire_in_time, 0, 4);
    tcase_add_test(tcase, the_end_of_time_is_a_time);
    tcase_add_test(tcase, a_poll_that_sleeps_as_told_is_in_time);
    tcase_add_loop_test(tcase, random_sets_and_cancels_agree_with_a_plain_list, 0, 4);
    tcase_set_timeout(tcase, 60);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}

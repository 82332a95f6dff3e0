/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What the classifier is measured against, and what undoes its work between two repetitions. It shares the classifier's
 * parser and its pinned maps; qpd.c itself is not included: the loaded, pinned programs are measured as they are. */
#include "roce.h"

/* Where in the frame to put what, before each repetition. Offset 0: nothing. */
struct bench_state {
	__u64 runs;
	__u64 missed; /* the floor found no entry, or the parser no queue pair */
	__u32 draw;   /* the next queue pair; at random: which of them, from 1 on */
	__u32 first_qp;
	__u32 qp_at;
	__u32 port_at; /* of the outer UDP header */
	__be16 port;
	__sum16 check;
	__u32 psn;   /* of the next packet */
	__u32 prime; /* of queue pairs drawn at random there are this many less one, */
	__u32 root;  /* … and the powers of this, modulo the prime, are all of them */
	__u32 pad;
};

BPF_TABLE_PINNED("array", __u32, struct bench_state, bench_state, 1, PIN_DIR "/bench_state");
/* [0]: the program under test. */
BPF_TABLE_PINNED("prog", __u32, __u32, bench_subject, 1, PIN_DIR "/bench_subject");

#define OFFSET_MAX 255

/* BPF_PROG_TEST_RUN hands each repetition what the one before left: the mark of a redirected packet in skb->cb, and a
 * source port that is right already. As on the wire, each packet comes without the one and with another port, and its PSN
 * is the next one of its queue pair. */
static __always_inline void restore(struct __sk_buff *skb, struct bench_state *state)
{
	void *start = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u32 at = state->port_at & OFFSET_MAX;
	struct udphdr *udp = start + at;

	state->runs++;
	skb->cb[0] = 0;
	if (at && (void *)(udp + 1) <= end) {
		udp->source = state->port;
		udp->check = state->check;
	}
}

static __always_inline void set_qp(struct __sk_buff *skb, struct bench_state *state, __u32 qp)
{
	void *start = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__be32 *dest_qp = start + (state->qp_at & OFFSET_MAX);

	if ((void *)(dest_qp + 1) <= end)
		*dest_qp = bpf_htonl(qp & 0xffffff);
}

static __always_inline void set_psn(struct __sk_buff *skb, struct bench_state *state, __u32 psn)
{
	void *start = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u32 at = state->qp_at & OFFSET_MAX;
	__be32 *word = start + at + 4;

	if (at && (void *)(word + 1) <= end)
		*word = bpf_htonl(psn & 0xffffff);
}

/* --- Harnesses: each prepares the frame and jumps to the subject. The jump is direct, since the index is constant. --- */

/* The same queue pair again and again. */
int bench_same(struct __sk_buff *skb)
{
	__u32 zero = 0;
	struct bench_state *state = bench_state.lookup(&zero);

	if (!state)
		return TC_ACT_SHOT;
	restore(skb, state);
	set_psn(skb, state, state->psn++);
	bench_subject.call(skb, 0);
	return TC_ACT_SHOT;
}

/* One of `qps` queue pairs, each once in a round and in no order that a processor could foresee: the powers of a primitive
 * root modulo a prime. So the PSN is the number of the round, and need not be looked up: a second miss of the cache, which
 * the atomic additions of the subject would have to wait for, is no part of a packet. */
int bench_random(struct __sk_buff *skb)
{
	__u32 zero = 0;
	struct bench_state *state = bench_state.lookup(&zero);

	if (!state)
		return TC_ACT_SHOT;
	restore(skb, state);
	set_qp(skb, state, state->first_qp + state->draw - 1);
	set_psn(skb, state, state->psn);
	state->draw = (__u64)state->draw * state->root % state->prime;
	state->psn += state->draw == 1;
	bench_subject.call(skb, 0);
	return TC_ACT_SHOT;
}

/* Each packet the next queue pair. */
int bench_next(struct __sk_buff *skb)
{
	__u32 zero = 0;
	struct bench_state *state = bench_state.lookup(&zero);

	if (!state)
		return TC_ACT_SHOT;
	restore(skb, state);
	set_qp(skb, state, state->draw++);
	bench_subject.call(skb, 0);
	return TC_ACT_SHOT;
}

/* --- Subjects --- */

int bench_empty(struct __sk_buff *skb)
{
	return PASS;
}

static __always_inline void miss(void)
{
	__u32 zero = 0;
	struct bench_state *state = bench_state.lookup(&zero);

	if (state)
		state->missed++;
}

/* The classifier's parser; what it found must be in memory at the end, or clang would leave most of it out. */
int bench_parse(struct __sk_buff *skb)
{
	struct packet packet;

	if (parse(skb, &packet) != VERDICT_OPEN)
		miss();
	asm volatile("" : : "r"(&packet) : "memory");
	return PASS;
}

static long (*redirect_neigh)(__u32 ifindex, struct bpf_redir_neigh *params, int length,
                              __u64 flags) = (void *)BPF_FUNC_redirect_neigh;

/* The least that steering a queue pair can cost: parse, one look-up in its map, two counters, redirect. */
int bench_floor(struct __sk_buff *skb)
{
	struct bpf_redir_neigh next_hop = {.nh_family = 2, .ipv4_nh = bpf_htonl(0xc6336402)};
	struct packet packet;
	struct qp *qp;

	if (parse(skb, &packet) != VERDICT_OPEN) {
		miss();
		return PASS;
	}
	qp = qps.lookup(&packet.key);
	if (!qp) {
		miss();
		return PASS;
	}
	qp->packets++;
	qp->bytes += skb->len;
	return redirect_neigh(1001, &next_hop, sizeof(next_hop), 0);
}

/* The least that a queue pair's first packet can cost: parse, and an entry in the map, for which another may have to go. */
int bench_insert(struct __sk_buff *skb)
{
	struct packet packet;
	struct qp entry = {.home = 1, .path = 1};

	if (parse(skb, &packet) != VERDICT_OPEN || qps.insert(&packet.key, &entry))
		miss();
	return PASS;
}

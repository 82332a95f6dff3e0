/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* A queue pair's entry, from its first packet on, and the packet's way out. */
#ifndef QPD_FLOW_H
#define QPD_FLOW_H

#include "bfd.h"
#include "count.h"
#include "entropy.h"
#include "place.h"
#include "roce.h"
#include "track.h"

#define FAMILY_INET 2
#define GUARD_MAGIC 0x71706421

/* --- The second pass: a redirected packet meets the egress hook of the uplink that it was sent to. skb->cb travels with
 * it, also while it waits for the neighbour to be resolved. --- */

static __always_inline void guard_set(struct __sk_buff *skb, __u32 ifindex)
{
	skb->cb[0] = GUARD_MAGIC;
	skb->cb[1] = ifindex;
}

static __always_inline bool guard_take(struct __sk_buff *skb)
{
	bool set = skb->cb[0] == GUARD_MAGIC;

	if (set)
		skb->cb[0] = 0;
	return set && skb->cb[1] == skb->ifindex;
}

/* --- The way out --- */

/* What shall become of a packet. */
struct decision {
	enum verdict verdict; /* VERDICT_OPEN, until the packet is known to leave by `path` or why not */
	__u32 path;
	__u16 source_port; /* of its QP */
};

/* Not under its own name: bcc 0.26 declares that without the length. */
static long (*redirect_to_next_hop)(__u32 ifindex, struct bpf_redir_neigh *params, int length,
                                    __u64 flags) = (void *)BPF_FUNC_redirect_neigh;

static __always_inline int redirect(struct __sk_buff *skb, const struct path *path)
{
	const __u32 *address = (const __u32 *)&path->next_hop;
	struct bpf_redir_neigh next_hop = {.nh_family = path->family};

	if (path->family == FAMILY_INET)
		next_hop.ipv4_nh = address[3];
	else
		copy_address((struct address *)next_hop.ipv6_nh, address);
	guard_set(skb, path->ifindex);
	return redirect_to_next_hop(path->ifindex, &next_hop, sizeof(next_hop), 0);
}

/* Sends the packet to the path's next hop, or lets it pass where that is the same. */
static __always_inline int leave_by(struct __sk_buff *skb, const struct packet *packet, const struct path *path,
                                    struct decision *decision)
{
	enum verdict verdict = VERDICT_REDIRECTED;
	int action = PASS;

	/* A bit without a path: the daemon is about to write one of them. Or a next hop that the kernel would not take for
	 * this packet, and drop it. */
	if (!path->ifindex || (path->family == FAMILY_INET && packet->outer_protocol != bpf_htons(ETH_P_IP))) {
		decision->verdict = VERDICT_NO_LIVING_PATH;
		decision->path = NO_PATH;
		return PASS;
	}
	set_entropy(skb, packet, bpf_htons(decision->source_port));
	if (path->ifindex == skb->ifindex && path->sole)
		verdict = VERDICT_OWN_PATH;
	else
		action = redirect(skb, path);
	if (decision->verdict == VERDICT_OPEN)
		decision->verdict = verdict;
	return action;
}

/* --- The entry --- */

/* The group whose prefix covers the outer destination best; NULL and NO_GROUP: none. */
static __always_inline struct group *find_group(const struct packet *packet, __u8 *id)
{
	struct destination_key prefix = {.prefixlen = 128};
	struct group *group = NULL;
	__u32 *found;

	copy_address(&prefix.address, &packet->destination);
	found = destinations.lookup(&prefix);
	if (found)
		group = groups.lookup(found);
	*id = group && group->members ? *found : NO_GROUP;
	return *id == NO_GROUP ? NULL : group;
}

/* Groups changed since the entry was cached: find the QP's own again. Its home stays. */
static __always_inline void refresh(const struct packet *packet, struct qp *qp, __u32 generation)
{
	struct group *group = find_group(packet, &qp->group);

	qp->members = group ? group->members : 0;
	copy_address(&qp->destination, &packet->destination);
	qp->generation = generation;
}

/* Moves the QP to the home that the daemon wishes, if it has been silent for long enough that nothing of it can be on the
 * old way any more. False: it has to wait. */
static __always_inline bool grant_wish(struct qp *qp, __u64 now)
{
	__u32 wish = qp->wish - 1;

	if (now - qp->last_seen_ns < qp->wish_idle_us * NS_PER_US)
		return false;
	qp->wish = 0;
	if (qp->members >> as_index(wish) & 1)
		move_home(qp, wish);
	return true;
}

/* Not current: groups have changed, or a wish waits. Such an entry never is current, so that the common way need not look
 * for wishes; once a timer tick is enough. */
static __always_inline void bring_up_to_date(const struct packet *packet, struct qp *qp, __u32 generation, __u64 now)
{
	if (qp->wish && qp->last_seen_ns == now)
		return;
	refresh(packet, qp, generation);
	if (qp->wish && !grant_wish(qp, now))
		qp->generation = NO_GENERATION;
}

/* A stand-in for a dead home: the first living path of the slot's order. */
static __always_inline __u32 stand_in(const struct qp *qp, __u64 usable)
{
	__u32 id = qp->group;
	struct group *group = groups.lookup(&id);
	struct slot_order *order;

	if (!usable || !group)
		return NO_PATH;
	order = order_of(group, qp->slot);
	return order ? choose(order, usable) : NO_PATH;
}

/* An entry to be filled and inserted. Its place is this CPU's own: 312 octets are too much for the stack. */
static __always_inline struct qp *blank_entry(struct counters *own)
{
	__builtin_memset(&own->fresh, 0, sizeof(own->fresh));
	return &own->fresh;
}

/* First packet of a QP: places it and makes its entry, unless another CPU has done so a moment ago. NULL: no entry, and
 * `decision` says why. */
static __always_inline struct qp *make_entry(struct __sk_buff *skb, struct packet *packet,
                                             const struct control *control, struct counters *own,
                                             struct decision *decision)
{
	struct slot_order *order;
	struct qp *qp = blank_entry(own);
	struct group *group = find_group(packet, &qp->group);
	__u64 usable;
	__u32 hash, home;
	struct qp *made;

	if (!group) {
		decision->verdict = VERDICT_UNKNOWN_GROUP;
		return NULL;
	}
	hash = hash_qp(&packet->key);
	qp->slot = slot_of(hash);
	qp->source_port = source_port_of(hash);
	qp->members = group->members;
	order = order_of(group, qp->slot);
	usable = group->members & living_paths();
	qp->counted = !only_answers(packet);
	home = order ? place(order, group, usable, control->placement, qp->counted) : NO_PATH;
	if (home == NO_PATH) {
		decision->verdict = VERDICT_NO_LIVING_PATH;
		return NULL;
	}
	qp->home = home;
	qp->path = home;
	qp->generation = control->generation;
	qp->first_seen_ns = bpf_ktime_get_ns();
	load_source(skb, packet, &qp->src);
	copy_address(&qp->destination, &packet->destination);

	if (!qps.insert(&packet->key, qp)) {
		tell_qp(EVENT_QP_NEW, &packet->key, home);
		return qps.lookup(&packet->key);
	}
	if (qp->counted)
		add_placed(home, -1);
	made = qps.lookup(&packet->key);
	if (!made) {
		/* Not where load would have put it: without an entry only the slot's order is the same for every packet. */
		decision->verdict = VERDICT_MAP_FULL;
		decision->path = choose(order, usable);
		decision->source_port = qp->source_port;
	}
	return made;
}

/* The path of a QP that has an entry. */
static __always_inline void follow_entry(struct packet *packet, struct qp *qp, __u32 generation, __u64 now,
                                         struct decision *decision)
{
	__u64 usable;

	if (qp->generation != generation)
		bring_up_to_date(packet, qp, generation, now);
	if (!qp->counted && !only_answers(packet))
		count_placed(qp);
	/* Atomic, since two CPUs may serve one QP; on one CPU it costs nothing that can be measured. */
	__sync_fetch_and_add(&qp->packets, 1);
	__sync_fetch_and_add(&qp->bytes, packet->bytes);
	qp->last_seen_ns = now;
	usable = qp->members & living_paths();
	decision->path = usable >> (qp->home & (PATHS_MAX - 1)) & 1 ? qp->home : stand_in(qp, usable);
	decision->source_port = qp->source_port;
	if (decision->path == NO_PATH) {
		decision->verdict = qp->members ? VERDICT_NO_LIVING_PATH : VERDICT_UNKNOWN_GROUP;
	} else if (packet->tagged) {
		decision->verdict = VERDICT_TAGGED;
	} else if (decision->path != qp->path) {
		/* Only where a packet takes it: `path` stays what it was while packets pass unsteered. */
		qp->path = decision->path;
		qp->moves++;
		qp->stamp_ns = 0;
		tell_qp(EVENT_QP_MOVED, &packet->key, decision->path);
	}
}

/* The egress hook's work on a RoCEv2 packet. Gives what the program returns. */
static __always_inline int steer_packet(struct __sk_buff *skb, struct packet *packet, struct counters *own)
{
	struct decision decision = {.verdict = VERDICT_OPEN, .path = NO_PATH};
	__u32 zero = 0;
	__u64 now = coarse_now(own);
	struct control *control_now = control.lookup(&zero);
	struct qp *qp = qps.lookup(&packet->key);
	struct path *path;
	int action = PASS;

	if (!control_now)
		return PASS;
	if (!qp)
		qp = make_entry(skb, packet, control_now, own, &decision);
	if (qp) {
		/* Before its way is found: after that, the verifier would follow PSNs once for each way. */
		packet->before = qp->path;
		packet->now = qp->path;
		track(skb, packet, qp, own, HOOK_STEER);
		follow_entry(packet, qp, control_now->generation, now, &decision);
	}
	if (decision.verdict == VERDICT_OPEN || (decision.verdict == VERDICT_MAP_FULL && !packet->tagged)) {
		path = paths.lookup(&decision.path);
		if (path) {
			if (path->deadline_ns && now > path->deadline_ns)
				silence(decision.path, path);
			action = leave_by(skb, packet, path, &decision);
		}
	} else {
		decision.path = NO_PATH;
	}
	count(own, HOOK_STEER, decision.verdict, decision.path, packet->bytes);
	return action;
}

#endif /* QPD_FLOW_H */

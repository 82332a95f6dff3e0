/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The BFD tap: listens to the control packets of single-hop sessions (RFC 5880, 5881) in both directions and takes a path
 * out of service, here in the kernel, when its session goes down or falls silent. It sends nothing and changes no packet. */
#ifndef QPD_BFD_H
#define QPD_BFD_H

#include "count.h"
#include "roce.h"

#define BFD_TTL            255 /* RFC 5881, 5: a packet with less was forwarded, and is not the neighbour's */
#define BFD_LENGTH         24
#define BFD_LENGTH_AUTH    26
#define BFD_VERSION        1
#define BFD_POLL           0x20
#define BFD_AUTHENTICATION 0x04
#define BFD_DEMAND         0x02
#define BFD_MULTIPOINT     0x01
#define BFD_ADMIN_DOWN     0
#define BFD_DOWN           1
#define BFD_UP             3
#define NS_PER_US          1000ULL

/* RFC 5880, 4.1. */
struct bfd_packet {
	__u8 version_diagnostic;
	__u8 state_flags;
	__u8 multiplier;
	__u8 length;
	__be32 my_discriminator;
	__be32 your_discriminator;
	__be32 desired_min_tx;
	__be32 required_min_rx;
	__be32 required_min_echo_rx;
};

/* What came by, in host byte order. */
struct bfd_heard {
	struct neighbour_address peer;
	struct bfd_side sender;
	__u32 your_discriminator;
};

/* --- Reading --- */

static __always_inline int load_ip(struct __sk_buff *skb, const struct packet *packet, enum hook hook, __u8 *ttl,
                                   struct address *peer)
{
	bool leaves = hook == HOOK_STEER;
	__be32 ipv4 = 0;

	if (packet->outer_protocol == bpf_htons(ETH_P_IPV6))
		return bpf_skb_load_bytes(skb, packet->inner_ip + offsetof(struct ipv6hdr, hop_limit), ttl, 1) ||
		       bpf_skb_load_bytes(skb, packet->inner_ip + (leaves ? 24 : 8), peer, sizeof(*peer));
	if (bpf_skb_load_bytes(skb, packet->inner_ip + offsetof(struct iphdr, ttl), ttl, 1) ||
	    bpf_skb_load_bytes(skb, packet->inner_ip + (leaves ? 16 : 12), &ipv4, sizeof(ipv4)))
		return -1;
	map_address(peer, ipv4);
	return 0;
}

/* The checks that RFC 5880, 6.8.6 asks for before a session is looked for. VERDICT_BFD: `heard` is good. */
static __always_inline enum verdict hear(struct __sk_buff *skb, const struct packet *packet, enum hook hook,
                                         struct bfd_heard *heard)
{
	struct bfd_packet bfd;
	__be16 udp_length;
	__u8 ttl, flags, state;

	if (bpf_skb_load_bytes(skb, packet->inner_udp + sizeof(struct udphdr), &bfd, sizeof(bfd)) ||
	    bpf_skb_load_bytes(skb, packet->inner_udp + offsetof(struct udphdr, len), &udp_length, sizeof(udp_length)))
		return VERDICT_TRUNCATED;
	if (load_ip(skb, packet, hook, &ttl, &heard->peer.address))
		return VERDICT_TRUNCATED;
	flags = bfd.state_flags & 0x3f;
	state = bfd.state_flags >> 6;
	if (ttl != BFD_TTL || bfd.version_diagnostic >> 5 != BFD_VERSION)
		return VERDICT_NOT_ROCE;
	if (bfd.length < (flags & BFD_AUTHENTICATION ? BFD_LENGTH_AUTH : BFD_LENGTH) ||
	    bfd.length + sizeof(struct udphdr) > bpf_ntohs(udp_length))
		return VERDICT_NOT_ROCE;
	if (!bfd.multiplier || flags & BFD_MULTIPOINT || !bfd.my_discriminator)
		return VERDICT_NOT_ROCE;
	if (!bfd.your_discriminator && state != BFD_DOWN && state != BFD_ADMIN_DOWN)
		return VERDICT_NOT_ROCE;
	heard->peer.ifindex = skb->ifindex;
	heard->sender.state = state;
	heard->sender.diagnostic = bfd.version_diagnostic & 0x1f;
	heard->sender.multiplier = bfd.multiplier;
	heard->sender.flags = flags;
	heard->sender.discriminator = bpf_ntohl(bfd.my_discriminator);
	heard->sender.desired_min_tx = bpf_ntohl(bfd.desired_min_tx);
	heard->sender.required_min_rx = bpf_ntohl(bfd.required_min_rx);
	heard->your_discriminator = bpf_ntohl(bfd.your_discriminator);
	return VERDICT_BFD;
}

/* --- Judging: all under LOCK_TAP --- */

static __always_inline void die(struct bfd_session *session, enum tap_cause cause)
{
	session->state = TAP_DEAD;
	session->cause = cause;
	session->downs++;
}

/* The time to hear the peer again has passed. Its packet may be the one that comes now: too late. */
static __always_inline void expire(struct bfd_session *session, __u64 now)
{
	if (!session->up_since_ns || !session->deadline_ns || now <= session->deadline_ns)
		return;
	session->up_since_ns = 0;
	session->remote.state = BFD_DOWN; /* RFC 5880, 6.8.1: what is believed of a peer not heard from */
	if (session->state == TAP_ALIVE)
		die(session, TAP_SILENT);
}

/* Another discriminator is another session, of which nothing is known yet. A path that was dead stays so until it has been
 * Up: a restarted BFD daemon has mended no link. */
static __always_inline void note_local(struct bfd_session *session, const struct bfd_side *said, __u64 now)
{
	__u32 in_force = session->local.required_min_rx;
	/* RFC 5880, 6.8.3: a shorter interval counts when the poll sequence that announces it is over. */
	bool polling = session->local.discriminator == said->discriminator && session->local.state == BFD_UP &&
	               said->flags & BFD_POLL && said->required_min_rx < in_force;

	if (session->local.discriminator != said->discriminator) {
		__builtin_memset(&session->remote, 0, sizeof(session->remote));
		session->up_since_ns = 0;
		session->last_rx_ns = 0;
		if (session->state == TAP_ALIVE)
			session->state = TAP_IDLE;
	}
	session->local = *said;
	if (polling)
		session->local.required_min_rx = in_force;
	session->last_tx_ns = now;
}

/* Only what the BFD daemon here would take for its session's (RFC 5880, 6.8.6). An authenticated session's packets cannot
 * be checked here: there the daemon's own word has to do. */
static __always_inline bool is_for(const struct bfd_session *session, const struct bfd_heard *heard)
{
	if (heard->your_discriminator && heard->your_discriminator != session->local.discriminator)
		return false;
	return !((session->local.flags | heard->sender.flags) & BFD_AUTHENTICATION);
}

static __always_inline void note_remote(struct bfd_session *session, const struct bfd_side *said, __u64 now)
{
	session->remote = *said;
	session->last_rx_ns = now;
}

/* RFC 5880, 6.8.4, and one interval more: the daemon here shall be the first to say so if it can. What the tap finds by
 * itself is for a daemon that hangs or is dead. */
static __always_inline void set_deadline(struct bfd_session *session)
{
	__u64 interval = session->local.required_min_rx > session->remote.desired_min_tx
	                         ? session->local.required_min_rx
	                         : session->remote.desired_min_tx;

	session->detection_ns = 0;
	session->deadline_ns = 0;
	/* No required interval, or demand mode (6.6): the peer owes no packets. */
	if (!session->last_rx_ns || !session->local.required_min_rx || session->local.flags & BFD_DEMAND)
		return;
	session->detection_ns = session->remote.multiplier * interval * NS_PER_US;
	if (session->up_since_ns)
		session->deadline_ns = session->last_rx_ns + session->detection_ns + interval * NS_PER_US;
}

static __always_inline void judge(struct bfd_session *session, __u64 now, __u64 hold_up)
{
	bool unheard = session->local.flags & BFD_AUTHENTICATION;
	bool up = session->local.state == BFD_UP && (unheard || session->remote.state == BFD_UP);
	bool administrative = session->local.state == BFD_ADMIN_DOWN ||
	                      (session->remote.discriminator && session->remote.state == BFD_ADMIN_DOWN);

	if (administrative) { /* RFC 5882, 3.2: says nothing about the path */
		session->up_since_ns = 0;
		if (session->state == TAP_DEAD)
			session->cause = TAP_LIFTED;
		session->state = TAP_IDLE;
	} else if (up) {
		if (!session->up_since_ns)
			session->up_since_ns = now;
		if (session->state == TAP_DEAD && now - session->up_since_ns >= hold_up)
			session->cause = TAP_UP;
		if (session->state != TAP_DEAD || now - session->up_since_ns >= hold_up)
			session->state = TAP_ALIVE;
	} else {
		session->up_since_ns = 0;
		if (session->state == TAP_ALIVE)
			die(session, session->local.state == BFD_UP ? TAP_REMOTE_DOWN : TAP_LOCAL_DOWN);
	}
	set_deadline(session);
}

/* Makes the tap's word agree with the session; true: it did not before. */
static __always_inline bool publish(struct bfd_session *session, struct path *at, __u32 path, __u64 *dead)
{
	__u64 bit = path < PATHS_MAX ? 1ULL << path : 0, before;

	if (session->path != path && session->path < PATHS_MAX)
		*dead &= ~(1ULL << session->path);
	session->path = path;
	before = *dead;
	if (session->state == TAP_DEAD)
		*dead |= bit;
	else
		*dead &= ~bit;
	if (at)
		at->deadline_ns = session->deadline_ns;
	return before != *dead;
}

/* --- The tap --- */

static __always_inline void tell_path(__u32 path, __u32 up, __u32 cause)
{
	struct event_path event = {
	        .head = {.kind = EVENT_PATH_STATE, .path = path, .time_ns = bpf_ktime_get_ns()},
	        .up = up,
	        .cause = cause,
	};

	events.ringbuf_output(&event, sizeof(event), 0);
}

static __always_inline struct bfd_session *session_of(struct neighbour_address *peer, enum hook hook)
{
	struct bfd_session *session = bfd_sessions.lookup(peer);
	struct bfd_session first = {.path = NO_PATH};

	/* Who is not spoken to from here is no peer, whatever he sends. */
	if (session || hook != HOOK_STEER)
		return session;
	bfd_sessions.insert(peer, &first);
	return bfd_sessions.lookup(peer);
}

/* Takes note of a BFD control packet; gives its verdict. */
static __always_inline enum verdict tap(struct __sk_buff *skb, const struct packet *packet, enum hook hook)
{
	__u32 lock = LOCK_TAP, word = LIVING_TAP, zero = 0, path = NO_PATH, up, cause;
	struct bfd_heard heard = {};
	enum verdict verdict = hear(skb, packet, hook, &heard);
	struct bfd_session *session;
	struct control *control_now;
	struct lock *guard;
	bool changed, taken = true;
	__u32 *known;
	__u64 *dead, now;
	struct path *at;

	if (verdict != VERDICT_BFD)
		return verdict;
	session = session_of(&heard.peer, hook);
	if (!session)
		return hook == HOOK_STEER ? VERDICT_MAP_FULL : VERDICT_NOT_ROCE;
	guard = locks.lookup(&lock);
	dead = living.lookup(&word);
	control_now = control.lookup(&zero);
	if (!guard || !dead || !control_now)
		return verdict;
	known = path_of_next_hop.lookup(&heard.peer);
	if (known)
		path = *known;
	at = paths.lookup(&path);
	now = bpf_ktime_get_ns();

	bpf_spin_lock(&guard->lock);
	expire(session, now);
	if (hook == HOOK_STEER)
		note_local(session, &heard.sender, now);
	else if (is_for(session, &heard))
		note_remote(session, &heard.sender, now);
	else
		taken = false;
	judge(session, now, control_now->hold_up_ns);
	changed = publish(session, at, path, dead);
	up = session->state != TAP_DEAD;
	cause = session->cause;
	bpf_spin_unlock(&guard->lock);

	if (changed && path < PATHS_MAX)
		tell_path(path, up, cause);
	return taken ? VERDICT_BFD : VERDICT_NOT_ROCE;
}

/* A packet is about to take a path whose peer has been silent for too long: that packet goes, the next ones do not. Its
 * session is told at its next packet. */
static __always_inline void silence(__u32 path, struct path *at)
{
	__u32 lock = LOCK_TAP, word = LIVING_TAP;
	struct lock *guard = locks.lookup(&lock);
	__u64 *dead = living.lookup(&word), now = bpf_ktime_get_ns();
	bool silent = false;

	if (!guard || !dead || path >= PATHS_MAX)
		return;
	bpf_spin_lock(&guard->lock);
	if (at->deadline_ns && now > at->deadline_ns) {
		at->deadline_ns = 0;
		silent = true;
		*dead |= 1ULL << path;
	}
	bpf_spin_unlock(&guard->lock);
	if (silent)
		tell_path(path, 0, TAP_SILENT);
}

#endif /* QPD_BFD_H */

/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Every map and the layout of what it holds. qpd/kernel/layout.py mirrors these structs as numpy dtypes, and a test
 * compares the two through the kernel's own record of sizes. Whoever changes size or meaning of a struct raises
 * QPD_LAYOUT: it is part of the pin path, so that two layouts never share a map.
 *
 * For the loader: bcc rewrites map accesses in its main text only, not in files that this includes. So hand it one text:
 * qpd.c with every #include "…" replaced, once, by the file (and #line, for its messages). Includes in <> stay. */
#ifndef QPD_MAPS_H
#define QPD_MAPS_H

#include <uapi/linux/bpf.h>

#include "verdict.h"

#define QPD_LAYOUT 5

/* The loader sets PIN_DIR ("…/v5") and QPS_MAX on the command line. */
#ifndef PIN_DIR
#define PIN_DIR "/sys/fs/bpf/qpd/v5"
#endif
#ifndef QPS_MAX
#define QPS_MAX 131072
#endif
#ifndef QPS_TYPE
#define QPS_TYPE "lru_hash" /* a test sets "hash", where a full map refuses */
#endif

#define PATHS_MAX        64   /* one bit each in the word of living paths */
#define SLOTS            4096 /* positions of a group; a power of two */
#define TABLES_MAX       16   /* distinct slot tables (one per set of weights) */
#define GROUPS_MAX       255  /* distinct sets of paths; with NO_GROUP they fill an octet */
#define DESTINATIONS_MAX 4096
#define NEIGHBOURS_MAX   1024
#define BFD_SESSIONS_MAX 256
#define EVENTS_BYTES     (512 * 1024) /* a power of two, and whole pages */
#define SCRATCH_BYTES    128
#define SLOT_WATCHED     0x8000 /* in struct qp's `slot`: the daemon wants to know when PSNs come by */
#define NO_PATH          0xff
#define NO_GROUP         0xff
#define NO_GENERATION    0

/* Buckets of round-trip times, from 2^RTT_FIRST ns: each doubling in RTT_STEPS equal steps, so that a bucket is 1.6 % of
 * its time wide at most. Less counts in the first bucket, more (4.3 s) in the last. */
#define RTT_FIRST     10
#define RTT_DOUBLINGS 22
#define RTT_STEPS     64
#define RTT_BUCKETS   (RTT_DOUBLINGS * RTT_STEPS)

/* Packet sequence numbers are 24 bits wide; a field that holds one has this bit set as soon as there is one to hold. */
#define PSN_KNOWN 0x01000000
#define PSN_MASK  0x00ffffff
/* In next_psn: the last request is a READ of `read_octets`, and takes more PSNs than are known. */
#define STREAM_READ 0x10000000

/* Marks of PSNs (marks.h): times in units of 256 ns, which begin anew after 18 minutes. */
#define MARKS            8
#define MARK_EXPONENT(n) ((n) < 4 ? (n) : 2 * (n)-3) /* 0, 1, 2, 3, 5, 7, 9, 11 */
#define MARK_SHIFT       8

/* An IPv6 address, or an IPv4 address as ::ffff:a.b.c.d (RFC 4291, 2.5.5.2). Network byte order. */
struct address {
	__u8 bytes[16];
};

enum living_index { LIVING_DAEMON, LIVING_TAP, LIVING_WORDS };
enum placement { PLACEMENT_HASH, PLACEMENT_BALANCED };

/* A queue pair as the packet names it: VXLAN network identifier (0 without VXLAN), destination host (inner destination
 * address), destination QP (BTH, 24 bits). Integers in host byte order. */
struct qp_key {
	__u32 vni;
	__u32 dest_qp;
	struct address dst;
};

/* One steered (egress) or observed (ingress) QP. Times: CLOCK_MONOTONIC, ns.
 *
 * What goes to a QP are requests, with the sender's own PSNs, and responses (ACK, NAK, READ and atomic responses), whose
 * PSNs are those of the requests that the QP made itself. What is known of either lies apart. 312 octets: with its key and
 * the kernel's head of 48 an entry begins and ends with a cache line. */
struct qp {
	/* What every packet needs, on one cache line. */
	__u64 packets;
	__u64 bytes;        /* frame length on this uplink, outer headers included */
	__u64 last_seen_ns; /* to a timer tick or two */
	__u64 members;      /* cached from the group while `generation` is current */
	__u32 generation;   /* control.generation at which group and members were cached; NO_GENERATION: a wish waits */
	__u8 group;         /* NO_GROUP: none covers the destination */
	__u8 counted;       /* 1: has sent more than answers, and is one of `placed` at its home. Under LOCK_PLACED */
	__u16 slot;         /* with SLOT_WATCHED, which only `tell` sets and takes away; on ingress nothing else */
	__u16 source_port;  /* entropy: the VXLAN outer source port that this QP gets */
	__u8 home;          /* path id given at the first packet; NO_PATH on ingress. Moves under LOCK_PLACED */
	__u8 path;          /* path id of the last packet */
	__u32 next_psn;     /* requests: the PSN after the newest; with PSN_KNOWN, and STREAM_… (psn.h) */
	__u64 window;       /* bit n: PSN next_psn - 1 - n came by */
	/* What responses and every packet that asks for one need. */
	__u32 next_response; /* READ responses: the PSN due next; with PSN_KNOWN, and RESPONSE_… (response.h) */
	__u32 acked_psn; /* the newest PSN that responses acknowledge: of requests of the QP dest_qp; with PSN_KNOWN */
	__u64 stamp_ns;  /* when the request `stamp_psn` left, whose response will tell the round-trip time; 0: none */
	__u32 stamp_psn;
	__u32 peer_qp; /* the QP at `src` that speaks with dest_qp; 0: not known. The daemon tells it */
	__u64 rtt_sum_ns;
	__u32 rtt_samples;
	__u32 rtt_last_ns;
	__u32 rtt_min_ns;   /* 0: no sample */
	__u32 acks;         /* responses that moved acked_psn on */
	__u32 wish_idle_us; /* how long the QP has to be silent before it moves to `wish` */
	__u8 wish;          /* path id + 1 that is to be its home, as the daemon told it; 0: none */
	__u8 pmtu;          /* path MTU of RDMA, as a power of two (8 to 12); 0: not known */
	__u8 transport;     /* opcode >> 5: 0 RC, 1 UC, 3 UD, 4 CNP and no more, 5 XRC */
	__u8 gap_path;      /* path id that the last missing PSNs were charged to */
	/* Counters of what is rare. */
	__u32 missing;       /* PSNs that were passed over when a later one came: lost before this hook, but for … */
	__u32 out_of_order;  /* … those of them that came later, and not because they were sent again */
	__u32 duplicates;    /* came again alone: not sent again by the sender (RC), or whatever came twice (UC) */
	__u32 retransmitted; /* packets sent again (RC) */
	__u32 go_backs;      /* how often the sender went back to an earlier PSN (RC: go-back-N) */
	__u32 lost_behind;   /* of these, not explained by a gap here nor by an RNR NAK: lost behind this hook */
	__u32 naks_sequence; /* NAKs to dest_qp: PSN sequence error, */
	__u32 naks_rnr;      /* … receiver not ready, */
	__u32 naks_remote;   /* … invalid request, remote access, remote operation, invalid RD request */
	__u32 read_octets;   /* length of the last READ request */
	__u32 cnps;          /* congestion notification packets to dest_qp */
	__u32 ecn_marked;    /* packets with CE, in the inner or outer IP header */
	__u32 fecn;          /* packets with the bit FECN in the BTH, */
	__u32 becn;          /* … with BECN */
	__u32 restarts;      /* jumps of the PSN that no loss explains: a new life of the QP number */
	__u32 moves;         /* how often the path changed */
	/* The rest. */
	__u64 first_seen_ns;
	struct address src;         /* inner source address of the first packet */
	struct address destination; /* outer destination address (the VTEP), or dst again without VXLAN */
	__u32 run_psn;              /* a step back in the stream of requests: the PSN due next in it, */
	__u8 run;            /* … and how many packets wait for being told late or sent again: WINDOW at most */
	__u8 rnr;            /* 1: an RNR NAK explains the next step back */
	__u16 response_gaps; /* READ responses: how many are missing, as far as 16 bits tell, */
	__u32 gap_psn;       /* the first PSN missing here that was not sent again yet; with PSN_KNOWN */
	__u32 run_from;      /* … and where it began */
	__u32 response_gap;  /* … from this PSN on */
	__u32 first_psn;     /* the first request of this life of the QP number that was seen here; with PSN_KNOWN */
	/* While watched (marks.h): when the newest PSN of each class was first asked for, and first answered; 0: not known. */
	__u32 asked_at[MARKS];    /* up to the newest request */
	__u32 answered_at[MARKS]; /* up to `acked_psn` */
};

/* One next hop on one uplink. ifindex 0: unused id. */
struct path {
	__u32 ifindex;
	__u8 family; /* AF_INET or AF_INET6 of the next hop */
	__u8 sole;   /* 1: the only path on its interface, so that passing is as good as redirecting */
	__u8 pad[2];
	struct address next_hop;
	char interface[16]; /* for whoever adopts the pinned map */
	__u64 deadline_ns;  /* the tap's: without a BFD packet until then the path is silent; 0: no such claim */
};

struct group {
	__u64 members; /* bit n: path id n belongs to it; 0: unused */
	__u32 table;   /* which slot table its slots are read from */
	__u32 pad;
	__u16 weight[PATHS_MAX]; /* by path id */
};

/* A slot's preference order: path ids, best first, NO_PATH after the last. It lists all paths of this node; a group's
 * members mask picks its own, so that a group that shrinks or grows leaves every other choice as it was. */
struct slot_order {
	__u8 path[PATHS_MAX];
};

/* Longest-prefix key: 128-bit addresses, so an IPv4 /24 is 96 + 24. */
struct destination_key {
	__u32 prefixlen;
	struct address address;
};

struct control {
	__u32 generation; /* raised by the daemon after each change of groups, destinations or tables; never NO_GENERATION */
	__u32 placement;  /* enum placement */
	__u64 hold_up_ns; /* how long a BFD session has to be Up before the tap lets its dead path serve again */
};

struct path_counters {
	__u64 packets;
	__u64 bytes;
};

/* What went wrong on a path, as struct qp counts it. */
struct path_faults {
	__u64 missing;
	__u64 out_of_order;
	__u64 retransmitted;
	__u64 lost_behind;
	__u64 ecn_marked;
};

/* Round-trip times of a path's requests: from this node to the remote host and back. */
struct path_rtt {
	__u64 samples;
	__u64 sum_ns;
	__u64 buckets[RTT_BUCKETS];
};

/* Per CPU. Counters are summed by the reader; the rest is the program's own. */
struct counters {
	__u64 verdicts[HOOKS][VERDICTS];
	struct path_counters path[HOOKS][PATHS_MAX];
	__u64 tick;                  /* this CPU's clock (count.h): the timer tick … */
	__u64 tick_ns;               /* … at which this was CLOCK_MONOTONIC */
	__u8 scratch[SCRATCH_BYTES]; /* the packet in hand (roce.h) */
	struct qp fresh;             /* an entry in the making (flow.h), too large for the stack */
	struct path_faults faults[HOOKS][PATHS_MAX];
};

/* What `balanced` weighs: QPs that send. Those that only answer carry next to nothing, and are not counted.
 * `placed` only grows, by the kernel (but for a placement that lost its race and is taken back, and for a QP that gets
 * another home); `gone` only the daemon writes, when it has seen QPs idle or evicted.
 * Active QPs of a path = placed - gone. Two maps, so that neither writer can undo the other. */
struct load {
	__u64 qps;
};

/* Serialises a short read-modify-write of two CPUs, which clang 14 offers no atomic instruction for under bcc. */
struct lock {
	struct bpf_spin_lock lock;
};

enum lock_index { LOCK_PLACED, LOCK_TAP, LOCKS };

enum event_kind { EVENT_QP_NEW = 1, EVENT_PATH_STATE = 2, EVENT_QP_MOVED = 3, EVENT_CM = 4 };

/* Header of every record in the ring; the kinds append their own fields. */
struct event {
	__u32 kind;
	__u32 path;
	__u64 time_ns;
};

struct event_qp {
	struct event head;
	struct qp_key key;
};

/* EVENT_CM: a message of the InfiniBand connection manager on its way to QP 1 (InfiniBand Architecture 1, 12.6). */
struct event_cm {
	struct event head;  /* path: as the packet's */
	struct qp_key key;  /* of the packet: dest_qp 1 */
	struct address src; /* who sent it */
	__u32 hook;         /* enum hook: leaves or arrives */
	__u32 attribute;    /* 0x10 REQ, 0x12 REJ, 0x13 REP, 0x14 RTU, 0x15 DREQ, 0x16 DREP */
	__u32 local_id;     /* the sender's communication id */
	__u32 remote_id;    /* the receiver's; 0 in a REQ */
	__u32 qpn;          /* REQ, REP: the sender's QP; DREQ: the receiver's; else 0 */
	__u32 psn;          /* REQ, REP: the first PSN that will be sent to that QP; else 0 */
};

/* What the program `tell` is given, behind 14 octets that PROG_TEST_RUN wants for an Ethernet header: fields of a living
 * entry to set, here where packets count in it. It returns enum told. */
enum tell_fields { TELL_PEER = 1, TELL_HOME = 2, TELL_LIFE = 4, TELL_WATCHED = 8 };
enum told { TOLD_DONE, TOLD_WAITS, TOLD_NO_ENTRY, TOLD_REFUSED, TOLD_MALFORMED };

struct tell {
	struct qp_key key;
	__u32 hook;    /* enum hook: an entry of `qps` or of `arrivals` */
	__u32 fields;  /* enum tell_fields, added up */
	__u32 peer_qp; /* 0: forget it */
	__u32 home; /* a path id; NO_PATH: forget a wish that waits. Only a member of the QP's group, and not on ingress */
	__u32 idle_us;  /* move home at once if the QP has been silent for that long, else in its first such silence */
	__u32 restarts; /* TELL_LIFE: only where this is the entry's, so that nothing is told of a life that is over */
	__u32 watched;  /* 1: note when PSNs come by; 0: no more, as when the peer is told */
};

/* What the tap has found about a path. */
enum tap_cause {
	TAP_UP,          /* Up on both sides for hold_up */
	TAP_LOCAL_DOWN,  /* this node's BFD daemon left Up */
	TAP_REMOTE_DOWN, /* the peer's did */
	TAP_SILENT,      /* the detection time and the daemon's time to say so passed without a packet */
	TAP_LIFTED,      /* AdminDown, or the path is no longer this session's: no claim */
};

/* EVENT_PATH_STATE: a bit of the tap's word changed. */
struct event_path {
	struct event head;
	__u32 up;    /* 1: serves, as far as the tap is concerned */
	__u32 cause; /* enum tap_cause */
};

/* A peer or next hop on an interface. */
struct neighbour_address {
	__u32 ifindex;
	struct address address;
};

/* What one side of a BFD session says of itself (RFC 5880, 4.1). Intervals in microseconds. */
struct bfd_side {
	__u8 state; /* 0 AdminDown, 1 Down, 2 Init, 3 Up */
	__u8 diagnostic;
	__u8 multiplier;
	__u8 flags; /* poll, final, control plane independent, authentication, demand, multipoint: 0x20 … 0x01 */
	__u32 discriminator;
	__u32 desired_min_tx;
	__u32 required_min_rx;
};

/* AdminDown and sessions never seen Up claim nothing: TAP_IDLE. */
enum tap_state { TAP_IDLE, TAP_ALIVE, TAP_DEAD };

/* A BFD session as its packets tell it. Times: CLOCK_MONOTONIC, ns. */
struct bfd_session {
	struct bfd_side local;  /* as sent; required_min_rx: as in force (RFC 5880, 6.8.3) */
	struct bfd_side remote; /* as received */
	__u64 last_tx_ns;
	__u64 last_rx_ns;
	__u64 detection_ns; /* RFC 5880, 6.8.4; 0: not known, or no packets are due */
	__u64 deadline_ns;  /* last_rx_ns + detection_ns + one interval; 0: silence proves nothing */
	__u64 up_since_ns;  /* both sides Up since; 0: they are not */
	__u32 downs;        /* how often the tap took it for dead */
	__u32 path;         /* path id; NO_PATH: the peer is no path's next hop */
	__u8 state;         /* enum tap_state */
	__u8 cause;         /* enum tap_cause of its last change */
	__u8 pad[6];
};

/* Where frames on an uplink come from: (interface, source MAC) -> path id. Written by the daemon from the neighbour table. */
struct neighbour_key {
	__u32 ifindex;
	__u8 mac[6];
	__u8 pad[2];
};

/* QPs that leave: qp_key -> qp. The least recently used entry makes room. */
BPF_TABLE_PINNED(QPS_TYPE, struct qp_key, struct qp, qps, QPS_MAX, PIN_DIR "/qps");
/* QPs that arrive: qp_key -> qp (path = where its packets come in). */
BPF_TABLE_PINNED(QPS_TYPE, struct qp_key, struct qp, arrivals, QPS_MAX, PIN_DIR "/arrivals");
/* path id -> next hop. */
BPF_TABLE_PINNED("array", __u32, struct path, paths, PATHS_MAX, PIN_DIR "/paths");
/* group id -> member paths and weights. */
BPF_TABLE_PINNED("array", __u32, struct group, groups, GROUPS_MAX, PIN_DIR "/groups");
/* table * SLOTS + slot -> preference order. */
BPF_TABLE_PINNED("array", __u32, struct slot_order, slots, TABLES_MAX *SLOTS, PIN_DIR "/slots");
/* underlay prefix -> group id. */
BPF_TABLE_PINNED7("lpm_trie", struct destination_key, __u32, destinations, DESTINATIONS_MAX, PIN_DIR "/destinations",
                  BPF_F_NO_PREALLOC);
/* [LIVING_DAEMON]: the word of living paths, as the daemon wants it. [LIVING_TAP]: the paths that the BFD tap holds down,
 * a bit set for a *dead* path, so that a map nobody has written yet constrains nothing. The kernel writes it, and puts it
 * right with every BFD packet; the daemon clears a bit only when it gives the id to another path.
 * A path serves if its bit is set in the one and clear in the other. */
BPF_TABLE_PINNED("array", __u32, __u64, living, LIVING_WORDS, PIN_DIR "/living");
/* [0]: generation and placement. */
BPF_TABLE_PINNED("array", __u32, struct control, control, 1, PIN_DIR "/control");
/* [0], per CPU: verdicts, and packets and bytes of each path, by hook. */
BPF_TABLE_PINNED("percpu_array", __u32, struct counters, counters, 1, PIN_DIR "/counters");
/* path id -> round-trip times of its requests. Shared by all CPUs: a QP tells one at a time, and most tell others. */
BPF_TABLE_PINNED("array", __u32, struct path_rtt, rtts, PATHS_MAX, PIN_DIR "/rtts");
/* path id -> QPs that send ever placed on it. */
BPF_TABLE_PINNED("array", __u32, struct load, placed, PATHS_MAX, PIN_DIR "/placed");
/* path id -> QPs counted in `placed` that are no longer active. */
BPF_TABLE_PINNED("array", __u32, struct load, gone, PATHS_MAX, PIN_DIR "/gone");
/* (interface, source MAC) -> path id. */
BPF_TABLE_PINNED("hash", struct neighbour_key, __u32, neighbours, NEIGHBOURS_MAX, PIN_DIR "/neighbours");
/* (interface, peer) -> BFD session. Made at the first packet that leaves; the daemon deletes those of uplinks that are gone. */
BPF_TABLE_PINNED("hash", struct neighbour_address, struct bfd_session, bfd_sessions, BFD_SESSIONS_MAX,
                 PIN_DIR "/bfd_sessions");
/* (interface, next hop) -> path id. Written by the daemon: whose life does a BFD session tell? */
BPF_TABLE_PINNED("hash", struct neighbour_address, __u32, path_of_next_hop, PATHS_MAX * 4, PIN_DIR "/path_of_next_hop");
/* [LOCK_…]: taken for a few instructions. */
BPF_TABLE_PINNED("array", __u32, struct lock, locks, LOCKS, PIN_DIR "/locks");

/* Records that begin with struct event, for the daemon. A full ring drops records: they are hints, the maps are the truth.
 * bcc has no macro for a pinned ring; its section name carries the pin as BPF_TABLE_PINNED does. */
struct events_table_t {
	int key;
	__u32 leaf;
	int (*ringbuf_output)(void *data, __u64 size, __u64 flags);
	__u32 max_entries;
};
__attribute__((section("maps/ringbuf:" PIN_DIR "/events"))) struct events_table_t events = {
        .max_entries = EVENTS_BYTES,
};

#endif /* QPD_MAPS_H */

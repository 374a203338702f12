(** * Certificates for nearest-centroid classifiers, checked by Coq

    An encoder f maps inputs to embeddings in a real inner-product space and is L-Lipschitz. Finitely many
    clusters, each a centroid mu_k with a class, decide: the nearest rule takes the class of the nearest
    centroid, the soft rule the class with the greatest logsumexp of -d_k^2 / (2 sigma^2), where
    d_k = |f x - mu_k|. A certificate is a radius within which no input changes the class. This file proves,
    from the laws of an inner-product space and the real numbers of the standard library alone:

    - section 3: [identity], the equation that everything rests on;
    - section 5: soundness of the dual bound, of "pairwise" and of "nearest"
      ([dual_sound], [pairwise_sound], [nearest_sound]);
    - section 6: the ladder triangle <= nearest <= pairwise = one-hot dual, and dual <= exact
      ([triangle_le_nearest], [nearest_le_pairwise], [pairwise_is_one_hot_dual], [dual_le_exact]);
    - section 7: what no certificate can exceed, and that "nearest" attains it with one centroid per class
      ([probe_reaches], [optimality], [nearest_tight], [nearest_tight_strict]);
    - section 8: looking at the second nearest centroid only is unsound ([second_nearest_unsound]);
    - section 9: soundness of the soft rule's bounds, dual, lse, local mean, global and log k
      ([soft_dual_sound], [soft_lse_sound], [soft_local_sound], [soft_global_sound], [soft_log_k_sound]),
      and that the last correction is needed ([soft_nearest_unsound]).

    Sections 1, 2 and 4 hold the definitions. To check: [coqc Certificate.v] (Coq 8.16). Section 10
    asks Coq for the axioms used: the three on which the standard library builds the real numbers and, for the
    soft rule, the excluded middle, on which that library's own proofs about exp and ln rest. *)

From Coq Require Import Reals Lra Psatz List Arith RList.
Import ListNotations.
Open Scope R_scope.

(** * 1. Real inner-product spaces *)

(** Vector-space laws and inner-product laws, and nothing else: no norm, no distance, no clusters. *)
Record inner_space := InnerSpace {
  carrier :> Type;
  zero : carrier;
  add : carrier -> carrier -> carrier;
  opp : carrier -> carrier;
  scale : R -> carrier -> carrier;
  inner : carrier -> carrier -> R;
  add_comm : forall x y, add x y = add y x;
  add_assoc : forall x y z, add x (add y z) = add (add x y) z;
  add_zero : forall x, add x zero = x;
  add_opp : forall x, add x (opp x) = zero;
  scale_one : forall x, scale 1 x = x;
  scale_scale : forall a b x, scale a (scale b x) = scale (a * b) x;
  scale_add : forall a x y, scale a (add x y) = add (scale a x) (scale a y);
  add_scale : forall a b x, scale (a + b) x = add (scale a x) (scale b x);
  inner_sym : forall x y, inner x y = inner y x;
  inner_add : forall x y z, inner (add x y) z = inner x z + inner y z;
  inner_scale : forall a x y, inner (scale a x) y = a * inner x y;
  inner_nonneg : forall x, 0 <= inner x x;
  inner_definite : forall x, inner x x = 0 -> x = zero
}.

Arguments zero {_}.
Arguments add {_} _ _.
Arguments opp {_} _.
Arguments scale {_} _ _.
Arguments inner {_} _ _.
Arguments inner_definite {_} _ _.

Definition sub {V : inner_space} (x y : V) : V := add x (opp y).
Definition norm {V : inner_space} (x : V) : R := sqrt (inner x x).
Definition dist {V : inner_space} (x y : V) : R := norm (sub x y).

Section InnerSpaceFacts.
Context {V : inner_space}.
Implicit Types x y z v : V.

Lemma inner_zero : forall y, inner (zero : V) y = 0.
Proof. intros y. pose proof (inner_add V zero zero y) as E. rewrite add_zero in E. lra. Qed.

Lemma inner_opp : forall x y, inner (opp x) y = - inner x y.
Proof.
  intros x y. pose proof (inner_add V x (opp x) y) as E.
  rewrite add_opp, inner_zero in E. lra.
Qed.

Lemma inner_add_r : forall x y z, inner x (add y z) = inner x y + inner x z.
Proof. intros. rewrite inner_sym, inner_add, !(inner_sym V x). reflexivity. Qed.

Lemma inner_scale_r : forall a x y, inner x (scale a y) = a * inner x y.
Proof. intros. rewrite inner_sym, inner_scale, (inner_sym V x). reflexivity. Qed.

Lemma inner_zero_r : forall x, inner x (zero : V) = 0.
Proof. intros. rewrite inner_sym. apply inner_zero. Qed.

Lemma inner_opp_r : forall x y, inner x (opp y) = - inner x y.
Proof. intros. rewrite inner_sym, inner_opp, (inner_sym V x). reflexivity. Qed.

End InnerSpaceFacts.

#[export] Hint Rewrite @inner_add @inner_add_r @inner_scale @inner_scale_r @inner_opp @inner_opp_r
  @inner_zero @inner_zero_r : inner.

(** Multiply every inner product out. *)
Ltac expand := unfold sub; autorewrite with inner.

Section Norms.
Context {V : inner_space}.
Implicit Types x y z v : V.

Lemma sub_zero : forall x y, sub x y = zero -> x = y.
Proof.
  unfold sub. intros x y E.
  rewrite <- (add_zero V x), <- (add_opp V y), (add_comm V y), add_assoc, E, add_comm.
  apply add_zero.
Qed.

(** Vectors are equal as soon as all their inner products are: this turns vector identities into identities
    between real numbers, which [ring] proves. *)
Lemma vector_ext : forall x y, (forall v, inner x v = inner y v) -> x = y.
Proof.
  intros x y E. apply sub_zero, inner_definite. expand. rewrite !E. ring.
Qed.

Lemma norm_nonneg : forall x, 0 <= norm x.
Proof. intros. apply sqrt_pos. Qed.

Lemma norm_sq : forall x, norm x * norm x = inner x x.
Proof. intros. apply sqrt_sqrt, inner_nonneg. Qed.

Lemma norm_zero : forall x, norm x = 0 -> x = zero.
Proof. intros x E. apply inner_definite. rewrite <- norm_sq, E. ring. Qed.

Lemma norm_scale : forall a x, norm (scale a x) = Rabs a * norm x.
Proof.
  intros a x. unfold norm. expand.
  replace (a * (a * inner x x)) with (Rsqr a * inner x x) by (unfold Rsqr; ring).
  rewrite sqrt_mult, sqrt_Rsqr_abs; [reflexivity | apply Rle_0_sqr | apply inner_nonneg].
Qed.

(** Cauchy-Schwarz, from |(|x| y - |y| x)|^2 >= 0. *)
Lemma cauchy_schwarz : forall x y, inner x y <= norm x * norm y.
Proof.
  intros x y.
  destruct (Req_dec (norm x) 0) as [E | Ex].
  { rewrite (norm_zero x E), inner_zero. apply Rmult_le_pos; apply norm_nonneg. }
  destruct (Req_dec (norm y) 0) as [E | Ey].
  { rewrite (norm_zero y E), inner_zero_r. apply Rmult_le_pos; apply norm_nonneg. }
  pose proof (norm_nonneg x). pose proof (norm_nonneg y).
  assert (0 < norm x * norm y) by (apply Rmult_lt_0_compat; lra).
  pose proof (inner_nonneg V (sub (scale (norm x) y) (scale (norm y) x))) as P.
  revert P. expand. rewrite <- !norm_sq, (inner_sym V y x). nra.
Qed.

Lemma cauchy_schwarz_abs : forall x y, Rabs (inner x y) <= norm x * norm y.
Proof.
  intros x y. apply Rabs_le. split; [| apply cauchy_schwarz].
  pose proof (cauchy_schwarz (scale (-1) x) y) as P. revert P.
  rewrite norm_scale. expand. rewrite Rabs_left; lra.
Qed.

Lemma le_of_sq : forall a b, 0 <= b -> a * a <= b * b -> a <= b.
Proof. intros. nra. Qed.

Lemma norm_add : forall x y, norm (add x y) <= norm x + norm y.
Proof.
  intros x y. pose proof (norm_nonneg x). pose proof (norm_nonneg y).
  apply le_of_sq; [lra |]. rewrite norm_sq. expand.
  rewrite <- !norm_sq, (inner_sym V y x). pose proof (cauchy_schwarz x y). nra.
Qed.

Lemma dist_nonneg : forall x y, 0 <= dist x y.
Proof. intros. apply norm_nonneg. Qed.

Lemma dist_sq : forall x y, dist x y ^ 2 = inner (sub x y) (sub x y).
Proof. intros. rewrite <- norm_sq. unfold dist. ring. Qed.

Lemma dist_sym : forall x y, dist x y = dist y x.
Proof. intros. unfold dist, norm. f_equal. expand. ring. Qed.

Lemma dist_self : forall x, dist x x = 0.
Proof. intros. unfold dist, norm. rewrite <- sqrt_0. f_equal. expand. ring. Qed.

Lemma dist_zero : forall x y, dist x y = 0 -> x = y.
Proof. intros x y E. apply sub_zero, norm_zero, E. Qed.

Lemma dist_triangle : forall x y z, dist x z <= dist x y + dist y z.
Proof.
  intros x y z. unfold dist at 1.
  replace (sub x z) with (add (sub x y) (sub y z)).
  - apply norm_add.
  - apply vector_ext. intros v. expand. ring.
Qed.

End Norms.

(** The record is inhabited: the real line and the plane. *)
Definition real_line : inner_space.
Proof.
  refine {| carrier := R; zero := 0; add := Rplus; opp := Ropp; scale := Rmult; inner := Rmult |};
    intros; solve [ring | nra].
Defined.

Definition plane : inner_space.
Proof.
  refine {| carrier := (R * R)%type; zero := (0, 0);
            add := fun x y => (fst x + fst y, snd x + snd y);
            opp := fun x => (- fst x, - snd x);
            scale := fun a x => (a * fst x, a * snd x);
            inner := fun x y => fst x * fst y + snd x * snd y |};
    intros; repeat match goal with p : (R * R)%type |- _ => destruct p end;
    cbn in *; solve [f_equal; ring | ring | nra | f_equal; nra].
Defined.

Lemma dist_real_line : forall x y : real_line, dist x y = Rabs (x - y).
Proof. intros. unfold dist, norm. cbn. apply sqrt_Rsqr_abs. Qed.

(** * 2. Sums over lists *)

Definition sum {T : Type} (F : T -> R) (l : list T) : R := fold_right (fun t acc => F t + acc) 0 l.

Definition vector_sum {T : Type} {V : inner_space} (F : T -> V) (l : list T) : V :=
  fold_right (fun t acc => add (F t) acc) zero l.

Section Sums.
Context {T : Type}.
Implicit Types (F G : T -> R) (l : list T).

Lemma sum_cons : forall F t l, sum F (t :: l) = F t + sum F l.
Proof. reflexivity. Qed.

Lemma sum_ext : forall F G l, (forall t, In t l -> F t = G t) -> sum F l = sum G l.
Proof.
  induction l as [| t l IH]; intros E; [reflexivity |].
  rewrite !sum_cons, E, IH; auto using in_cons, in_eq.
Qed.

Lemma sum_le : forall F G l, (forall t, In t l -> F t <= G t) -> sum F l <= sum G l.
Proof.
  induction l as [| t l IH]; intros E; [apply Rle_refl |].
  apply Rplus_le_compat; auto using in_cons, in_eq.
Qed.

Lemma sum_lt : forall F G l, l <> [] -> (forall t, In t l -> F t < G t) -> sum F l < sum G l.
Proof.
  intros F G [| t l] N E; [contradiction |].
  apply Rplus_lt_le_compat; [apply E; now left |].
  apply sum_le. intros s I. apply Rlt_le, E. now right.
Qed.

Lemma sum_linear : forall a b F G l,
  sum (fun t => a * F t + b * G t) l = a * sum F l + b * sum G l.
Proof. induction l as [| t l IH]; [cbn | rewrite !sum_cons, IH]; ring. Qed.

Lemma sum_scale : forall a F l, sum (fun t => a * F t) l = a * sum F l.
Proof. induction l as [| t l IH]; [cbn | rewrite !sum_cons, IH]; ring. Qed.

Lemma sum_const : forall a l, sum (fun _ => a) l = INR (length l) * a.
Proof.
  induction l as [| t l IH]; [cbn; ring |].
  cbn [length]. rewrite sum_cons, IH, S_INR. ring.
Qed.

Lemma sum_pos_term : forall F l, 0 < sum F l -> exists t, In t l /\ 0 < F t.
Proof.
  induction l as [| t l IH]; intros P; [cbn in P; lra | rewrite sum_cons in P].
  destruct (Rlt_le_dec 0 (F t)) as [Q | Q]; [exists t; auto using in_eq |].
  destruct IH as [s [I Q']]; [lra | exists s; auto using in_cons].
Qed.

Lemma sum_nonneg : forall F l, (forall t, In t l -> 0 <= F t) -> 0 <= sum F l.
Proof.
  intros F l P. replace 0 with (sum (fun _ => 0) l) by (rewrite sum_const; ring).
  now apply sum_le.
Qed.

Lemma sum_pos : forall F l, l <> [] -> (forall t, In t l -> 0 < F t) -> 0 < sum F l.
Proof.
  intros F l N P. replace 0 with (sum (fun _ => 0) l) by (rewrite sum_const; ring).
  now apply sum_lt.
Qed.

Lemma term_le_sum : forall F l t, (forall s, In s l -> 0 <= F s) -> In t l -> F t <= sum F l.
Proof.
  induction l as [| s l IH]; intros t P I; [contradiction | rewrite sum_cons].
  assert (0 <= sum F l) by auto using sum_nonneg, in_cons.
  pose proof (P s (in_eq s l)).
  destruct I as [-> | I]; [lra |].
  enough (F t <= sum F l) by lra. apply IH; auto using in_cons.
Qed.

Lemma sum_map : forall {S : Type} (g : S -> T) F (l : list S),
  sum F (map g l) = sum (fun s => F (g s)) l.
Proof. induction l as [| s l IH]; [| cbn [map]; rewrite !sum_cons, IH]; reflexivity. Qed.

Lemma inner_vector_sum : forall {V : inner_space} (v : V) (F : T -> V) l,
  inner v (vector_sum F l) = sum (fun t => inner v (F t)) l.
Proof.
  induction l as [| t l IH]; [apply inner_zero_r |].
  rewrite sum_cons, <- IH. apply inner_add_r.
Qed.

(** The standard library's minimum and maximum of a list. On the empty list they return a conventional value;
    here the lists of own clusters are never empty, and without rivals there is nothing to certify. *)
Lemma arg_max : forall F l, l <> [] -> {m : T | In m l /\ F m = MaxRlist (map F l)}.
Proof.
  induction l as [| t l IH]; intros N; [contradiction |].
  destruct l as [| s l]; [exists t; auto using in_eq |].
  destruct IH as [m [I E]]; [discriminate |].
  change (MaxRlist (map F (t :: s :: l))) with (Rmax (F t) (MaxRlist (map F (s :: l)))).
  rewrite <- E. destruct (Rle_lt_dec (F m) (F t)) as [Q | Q].
  - exists t. rewrite Rmax_left; auto using in_eq.
  - exists m. rewrite Rmax_right; auto using in_cons, Rlt_le.
Qed.

Lemma below_min : forall r F l, r < MinRlist (map F l) -> forall t, In t l -> r < F t.
Proof.
  intros r F l B t I. eapply Rlt_le_trans; [exact B |].
  apply MinRlist_P1. now apply in_map.
Qed.

Lemma min_mono : forall F G l, (forall t, In t l -> F t <= G t) ->
  MinRlist (map F l) <= MinRlist (map G l).
Proof.
  induction l as [| t [| s l] IH]; intros E; [apply Rle_refl | apply E; now left |].
  change (Rmin (F t) (MinRlist (map F (s :: l))) <= Rmin (G t) (MinRlist (map G (s :: l)))).
  pose proof (E t (or_introl eq_refl)).
  specialize (IH (fun u I => E u (or_intror I))).
  apply Rmin_glb; [pose proof (Rmin_l (F t) (MinRlist (map F (s :: l)))) |
                   pose proof (Rmin_r (F t) (MinRlist (map F (s :: l))))]; lra.
Qed.

Lemma le_min : forall r F l, l <> [] -> (forall t, In t l -> r <= F t) -> r <= MinRlist (map F l).
Proof.
  induction l as [| t [| s l] IH]; intros N E; [contradiction | apply E; now left |].
  apply Rmin_glb; [apply E; now left |]. apply IH; [discriminate |].
  intros u I. apply E. now right.
Qed.

End Sums.

(** * 3. Clusters and the nearest rule *)

Record cluster (V : inner_space) := Cluster { centroid : V; label : nat }.
Arguments Cluster {V} _ _.
Arguments centroid {V} _.
Arguments label {V} _.

Definition own {V : inner_space} (ks : list (cluster V)) (c : nat) : list (cluster V) :=
  filter (fun k => Nat.eqb (label k) c) ks.

Definition rivals {V : inner_space} (ks : list (cluster V)) (c : nat) : list (cluster V) :=
  filter (fun k => negb (Nat.eqb (label k) c)) ks.

(** d_k(z), the distance from the embedding z to the centroid of k. *)
Definition d {V : inner_space} (z : V) (k : cluster V) : R := dist z (centroid k).

(** The nearest rule predicts c at z: some cluster of class c is strictly closer than every cluster of another
    class. At a tie between classes nothing is predicted. *)
Definition predicts {V : inner_space} (ks : list (cluster V)) (z : V) (c : nat) : Prop :=
  exists i, In i (own ks c) /\ forall j, In j (rivals ks c) -> d z i < d z j.

(** mu_j - mu_i, and the gap (d_j^2 - d_i^2) / 2, which is positive where i is the closer one. *)
Definition normal {V : inner_space} (i j : cluster V) : V := sub (centroid j) (centroid i).
Definition gap {V : inner_space} (z : V) (i j : cluster V) : R := (d z j ^ 2 - d z i ^ 2) / 2.

(** All that is ever asked of the encoder; [input_dist] may be any function. *)
Definition lipschitz {X : Type} {V : inner_space} (input_dist : X -> X -> R) (f : X -> V) (L : R) :=
  0 < L /\ forall x x', dist (f x) (f x') <= L * input_dist x x'.

(** How the difference of two squared distances changes with the point: linearly, and the point's own square drops
    out. Everything below rests on this. *)
Theorem identity : forall (V : inner_space) (z z' : V) (i j : cluster V),
  d z' j ^ 2 - d z' i ^ 2 = d z j ^ 2 - d z i ^ 2 - 2 * inner (sub z' z) (sub (centroid j) (centroid i)).
Proof.
  intros V z z' i j. unfold d. rewrite !dist_sq. expand.
  rewrite !(inner_sym V (centroid _) z), !(inner_sym V (centroid _) z'). ring.
Qed.

Section NearestRule.
Context {V : inner_space}.
Implicit Types (z p : V) (i j k A : cluster V) (ks : list (cluster V)) (c : nat).

Lemma in_own : forall k ks c, In k (own ks c) <-> In k ks /\ label k = c.
Proof. intros. unfold own. now rewrite filter_In, Nat.eqb_eq. Qed.

Lemma in_rivals : forall k ks c, In k (rivals ks c) <-> In k ks /\ label k <> c.
Proof. intros. unfold rivals. now rewrite filter_In, Bool.negb_true_iff, Nat.eqb_neq. Qed.

Lemma own_or_rival : forall k ks c, In k ks -> In k (own ks c) \/ In k (rivals ks c).
Proof.
  intros k ks c I. rewrite in_own, in_rivals. destruct (Nat.eq_dec (label k) c); auto.
Qed.

(** [predicts] says what it should: every nearest centroid has the predicted class, and there is one such
    class at most. *)
Theorem predicts_nearest : forall ks z c k, predicts ks z c ->
  In k ks -> (forall m, In m ks -> d z k <= d z m) -> label k = c.
Proof.
  intros ks z c k [i [I P]] K N.
  destruct (own_or_rival k ks c K) as [O | O]; [now apply in_own in O |].
  specialize (P k O). apply in_own in I. specialize (N i (proj1 I)). lra.
Qed.

Theorem predicts_unique : forall ks z c c', predicts ks z c -> predicts ks z c' -> c = c'.
Proof.
  intros ks z c c' [i [I P]] [i' [I' P']]. apply in_own in I, I'.
  destruct (Nat.eq_dec c c') as [| N]; [assumption | exfalso].
  assert (In i' (rivals ks c)) as J by (rewrite in_rivals; intuition congruence).
  assert (In i (rivals ks c')) as J' by (rewrite in_rivals; intuition congruence).
  specialize (P _ J). specialize (P' _ J'). lra.
Qed.

Lemma d_nonneg : forall z k, 0 <= d z k.
Proof. intros. apply dist_nonneg. Qed.

Lemma gap_pos : forall z i j, 0 < gap z i j <-> d z i < d z j.
Proof.
  intros z i j. unfold gap. pose proof (d_nonneg z i). pose proof (d_nonneg z j).
  split; nra.
Qed.

(** It is enough to beat each rival with some centroid of the class, not the same one each time. *)
Lemma predicts_each_rival : forall ks z c, own ks c <> [] ->
  (forall j, In j (rivals ks c) -> exists i, In i (own ks c) /\ 0 < gap z i j) -> predicts ks z c.
Proof.
  intros ks z c N B. destruct (arg_max (fun i => - d z i) _ N) as [m [M E]].
  exists m. split; [exact M |]. intros j J.
  destruct (B j J) as [i [I G]]. apply gap_pos in G.
  assert (- d z i <= - d z m); [| lra].
  rewrite E. apply MaxRlist_P1. now apply (in_map (fun i => - d z i)).
Qed.

Lemma normal_pos : forall i j, centroid j <> centroid i -> 0 < norm (normal i j).
Proof.
  intros i j N. destruct (norm_nonneg (normal i j)) as [| E]; [assumption |].
  exfalso. apply N, dist_zero. now symmetry.
Qed.

(** The identity in the form used below. *)
Lemma gap_moved : forall z z' i j, gap z' i j = gap z i j - inner (sub z' z) (normal i j).
Proof. intros z z' i j. pose proof (identity V z z' i j). unfold gap, normal. lra. Qed.

End NearestRule.

(** * 4. The certificates, as functions *)

Section Certificates.
Context {V : inner_space}.
Implicit Types (L : R) (z : V) (i j A : cluster V) (ks : list (cluster V)) (c : nat).

(** (d_j^2 - d_i^2) / (2 L |mu_j - mu_i|). *)
Definition quotient L z i j : R := (d z j ^ 2 - d z i ^ 2) / (2 * L * norm (normal i j)).

(** [triangle]: min over the rivals of (d_j - d_A) / (2 L). *)
Definition triangle_radius ks L z A : R :=
  MinRlist (map (fun j => (d z j - d z A) / (2 * L)) (rivals ks (label A))).

(** [nearest], the paper's theorem: min over the rivals of the quotient with A. *)
Definition nearest_radius ks L z A : R :=
  MinRlist (map (quotient L z A) (rivals ks (label A))).

(** [pairwise]: min over the rivals of the max over the own clusters of the quotient. *)
Definition pairwise_radius ks L z c : R :=
  MinRlist (map (fun j => MaxRlist (map (fun i => quotient L z i j) (own ks c))) (rivals ks c)).

(** A weighted list of clusters (the dual variables lambda, each beside its own centroid), and sum_i lambda_i
    F(i), sum_i lambda_i (mu_j - mu_i). *)
Definition weighted := list (R * cluster V).
Definition weighted_sum (F : cluster V -> R) (ws : weighted) : R :=
  sum (fun w => fst w * F (snd w)) ws.
Definition weighted_normal (ws : weighted) j : V :=
  vector_sum (fun w => scale (fst w) (normal (snd w) j)) ws.

(** sum_i lambda_i g_i / (L |sum_i lambda_i (mu_j - mu_i)|), g_i = (d_j^2 - d_i^2) / 2. *)
Definition dual_quotient L z (ws : weighted) j : R :=
  weighted_sum (fun i => gap z i j) ws / (L * norm (weighted_normal ws j)).

(** [exact], from below: the dual value at weights chosen freely for each rival. *)
Definition dual_radius ks L z c (weights : cluster V -> weighted) : R :=
  MinRlist (map (fun j => dual_quotient L z (weights j) j) (rivals ks c)).

Definition admissible ks c (ws : weighted) : Prop :=
  forall w, In w ws -> 0 <= fst w /\ In (snd w) (own ks c).

End Certificates.
Arguments weighted : clear implicits.

(** * 5. Soundness *)

(** Each theorem speaks of every x' at an input distance below the radius, x itself among them. A radius that
    is zero or negative certifies nothing, so clipping it at 0 would change nothing. *)

(** One lemma deals with every division below. A zero denominator gives the value 0 (x / 0 = 0 in Coq), and no
    distance is below 0, so such a ratio certifies nothing: an own centroid that coincides with a rival is
    skipped in effect, as the convention of the ladder has it. *)
Lemma below_ratio : forall r a b, 0 <= r -> 0 <= b -> r < a / b -> r * b < a.
Proof.
  intros r a b R0 B0 Q. destruct (Req_dec b 0) as [-> | N].
  - unfold Rdiv in Q. rewrite Rinv_0 in Q. lra.
  - replace a with (a / b * b) by now field. apply Rmult_lt_compat_r; lra.
Qed.

Lemma divide_le : forall a b n, 0 < n -> a * n <= b -> a <= b / n.
Proof.
  intros a b n N Q. replace a with (a * n / n) by (field; lra).
  apply Rmult_le_compat_r; [apply Rlt_le, Rinv_0_lt_compat, N | exact Q].
Qed.

Lemma input_dist_nonneg : forall (X : Type) (V : inner_space) input_dist (f : X -> V) L x x',
  lipschitz input_dist f L -> 0 <= input_dist x x'.
Proof.
  intros X V D f L x x' [P Q]. pose proof (dist_nonneg (f x) (f x')). specialize (Q x x'). nra.
Qed.

(** An input radius a / (L n) that is not reached keeps the feature displacement times n below a. *)
Lemma displacement : forall (X : Type) (V : inner_space) input_dist (f : X -> V) L x x' a n,
  lipschitz input_dist f L -> 0 <= n -> input_dist x x' < a / (L * n) ->
  dist (f x) (f x') * n < a.
Proof.
  intros X V D f L x x' a n H N Q.
  pose proof (input_dist_nonneg _ _ _ _ _ x x' H). destruct H as [P H].
  assert (0 <= L * n) by nra.
  apply below_ratio in Q; [| assumption ..].
  specialize (H x x'). nra.
Qed.

Section Soundness.
Context {V : inner_space}.
Implicit Types (L : R) (z : V) (i j A : cluster V) (ks : list (cluster V)) (c : nat).

Lemma quotient_gap : forall L z i j, quotient L z i j = gap z i j / (L * norm (normal i j)).
Proof. intros. unfold quotient, gap, Rdiv. rewrite !Rinv_mult. ring. Qed.

Lemma inner_displacement : forall z z' (n : V), inner (sub z' z) n <= dist z z' * norm n.
Proof. intros. rewrite dist_sym. apply cauchy_schwarz. Qed.

(** If the weighted gap exceeds what a displacement can take from it, some own centroid of positive weight is
    still ahead of the rival. *)
Lemma weighted_gap_survives : forall z z' (ws : weighted V) j,
  (forall w, In w ws -> 0 <= fst w) ->
  dist z z' * norm (weighted_normal ws j) < weighted_sum (fun i => gap z i j) ws ->
  exists w, In w ws /\ 0 < gap z' (snd w) j.
Proof.
  intros z z' ws j P Q.
  assert (0 < weighted_sum (fun i => gap z' i j) ws) as S.
  { pose proof (inner_displacement z z' (weighted_normal ws j)) as C.
    unfold weighted_normal in C at 1. rewrite inner_vector_sum in C.
    replace (weighted_sum (fun i => gap z' i j) ws) with
      (1 * weighted_sum (fun i => gap z i j) ws
       + -1 * sum (fun w => inner (sub z' z) (scale (fst w) (normal (snd w) j))) ws); [lra |].
    unfold weighted_sum. rewrite <- sum_linear. apply sum_ext. intros w _.
    rewrite (gap_moved z z'), inner_scale_r. ring. }
  apply sum_pos_term in S. destruct S as [w [I G]]. exists w. split; [exact I |].
  specialize (P w I). nra.
Qed.

Lemma gap_survives : forall z z' i j,
  dist z z' * norm (normal i j) < gap z i j -> 0 < gap z' i j.
Proof.
  intros z z' i j Q. rewrite (gap_moved z z').
  pose proof (inner_displacement z z' (normal i j)). lra.
Qed.

End Soundness.

(** The dual bound. For each rival take any non-negative weights on the own clusters: no input closer than the
    [dual_radius] leaves the class. *)
Theorem dual_sound :
  forall (V : inner_space) (X : Type) (input_dist : X -> X -> R) (f : X -> V) (L : R),
  lipschitz input_dist f L ->
  forall (ks : list (cluster V)) (c : nat) (weights : cluster V -> weighted V) (x x' : X),
  own ks c <> [] ->
  (forall j, In j (rivals ks c) -> admissible ks c (weights j)) ->
  input_dist x x' < dual_radius ks L (f x) c weights ->
  predicts ks (f x') c.
Proof.
  intros V X D f L H ks c weights x x' N P B.
  apply predicts_each_rival; [exact N |]. intros j J.
  apply below_min with (t := j) in B; [| exact J].
  apply displacement with (1 := H) in B; [| apply norm_nonneg].
  apply weighted_gap_survives in B; [| intros w I; now apply (P j J)].
  destruct B as [w [I G]]. exists (snd w). split; [now apply (P j J) | exact G].
Qed.

(** [pairwise] is sound: each rival may be held off by a different own centroid. *)
Theorem pairwise_sound :
  forall (V : inner_space) (X : Type) (input_dist : X -> X -> R) (f : X -> V) (L : R),
  lipschitz input_dist f L ->
  forall (ks : list (cluster V)) (c : nat) (x x' : X),
  own ks c <> [] ->
  input_dist x x' < pairwise_radius ks L (f x) c ->
  predicts ks (f x') c.
Proof.
  intros V X D f L H ks c x x' N B.
  apply predicts_each_rival; [exact N |]. intros j J.
  apply below_min with (t := j) in B; [| exact J].
  destruct (arg_max (fun i => quotient L (f x) i j) (own ks c) N) as [i [I E]].
  exists i. split; [exact I |].
  rewrite <- E, quotient_gap in B.
  apply displacement with (1 := H) in B; [| apply norm_nonneg].
  now apply gap_survives in B.
Qed.

(** [nearest], the paper's theorem. That A is nearest to f x need not be assumed: if it is not, the radius is
    not positive and no x' qualifies. *)
Theorem nearest_sound :
  forall (V : inner_space) (X : Type) (input_dist : X -> X -> R) (f : X -> V) (L : R),
  lipschitz input_dist f L ->
  forall (ks : list (cluster V)) (A : cluster V) (x x' : X),
  In A ks ->
  input_dist x x' < nearest_radius ks L (f x) A ->
  predicts ks (f x') (label A).
Proof.
  intros V X D f L H ks A x x' I B.
  exists A. split; [now apply in_own |]. intros j J.
  apply below_min with (t := j) in B; [| exact J].
  rewrite quotient_gap in B.
  apply displacement with (1 := H) in B; [| apply norm_nonneg].
  apply gap_pos. now apply gap_survives in B.
Qed.

(** * 6. The ladder: triangle <= nearest <= pairwise = one-hot dual, dual <= exact *)

(** (d_j - d_A) / 2 <= (d_j^2 - d_A^2) / (2 |mu_j - mu_A|), because |mu_j - mu_A| <= d_j + d_A. Where the
    centroids coincide both sides are 0. *)
Lemma triangle_le_quotient : forall (V : inner_space) (L : R) (z : V) (A j : cluster V),
  0 < L -> d z A <= d z j ->
  (d z j - d z A) / (2 * L) <= quotient L z A j.
Proof.
  intros V L z A j P Q. unfold quotient, normal. fold (dist (centroid j) (centroid A)).
  pose proof (dist_triangle (centroid j) z (centroid A)) as T.
  rewrite (dist_sym _ z) in T. fold (d z j) (d z A) in T.
  destruct (Req_dec (dist (centroid j) (centroid A)) 0) as [E | E].
  - apply dist_zero in E. replace (d z j) with (d z A) by (unfold d; now rewrite E).
    unfold Rdiv. rewrite !Rminus_diag_eq by reflexivity. lra.
  - pose proof (dist_nonneg (centroid j) (centroid A)).
    apply divide_le; [nra |].
    replace ((d z j - d z A) / (2 * L) * (2 * L * dist (centroid j) (centroid A)))
      with ((d z j - d z A) * dist (centroid j) (centroid A)) by (field; lra).
    nra.
Qed.

(** [triangle] <= [nearest]. *)
Theorem triangle_le_nearest :
  forall (V : inner_space) (ks : list (cluster V)) (L : R) (z : V) (A : cluster V),
  0 < L ->
  (forall j, In j (rivals ks (label A)) -> d z A <= d z j) ->
  triangle_radius ks L z A <= nearest_radius ks L z A.
Proof. intros. apply min_mono. intros j J. apply triangle_le_quotient; auto. Qed.

(** [nearest] <= [pairwise]: A is among the candidates. *)
Theorem nearest_le_pairwise :
  forall (V : inner_space) (ks : list (cluster V)) (L : R) (z : V) (A : cluster V),
  In A ks ->
  nearest_radius ks L z A <= pairwise_radius ks L z (label A).
Proof.
  intros V ks L z A I. apply min_mono. intros j J. apply MaxRlist_P1.
  apply (in_map (fun i => quotient L z i j)). now apply in_own.
Qed.

(** The dual value at the one-hot weight on i is the quotient with i. *)
Lemma one_hot : forall (V : inner_space) (L : R) (z : V) (i j : cluster V),
  dual_quotient L z [(1, i)] j = quotient L z i j.
Proof.
  intros V L z i j. rewrite quotient_gap. unfold dual_quotient, weighted_sum, weighted_normal.
  cbn. rewrite scale_one, add_zero. f_equal. ring.
Qed.

(** [pairwise] is the dual bound at the best one-hot weights. *)
Theorem pairwise_is_one_hot_dual :
  forall (V : inner_space) (ks : list (cluster V)) (L : R) (z : V) (c : nat),
  own ks c <> [] ->
  exists best : cluster V -> cluster V,
    (forall j, In (best j) (own ks c)) /\
    pairwise_radius ks L z c = dual_radius ks L z c (fun j => [(1, best j)]).
Proof.
  intros V ks L z c N.
  exists (fun j => proj1_sig (arg_max (fun i => quotient L z i j) (own ks c) N)).
  split; [intros j; now destruct arg_max |].
  unfold pairwise_radius, dual_radius. f_equal. apply map_ext. intros j.
  rewrite one_hot. now destruct arg_max.
Qed.

(** Weak duality, dual <= [exact]: a point where the rival j is at least as close as the whole class is no
    nearer than any dual value, so the dual value never exceeds the exact distance. *)
Theorem dual_le_exact :
  forall (V : inner_space) (ks : list (cluster V)) (c : nat) (ws : weighted V) (j : cluster V)
         (L : R) (z p : V),
  0 < L -> admissible ks c ws ->
  (forall i, In i (own ks c) -> d p j <= d p i) ->
  dual_quotient L z ws j <= dist z p / L.
Proof.
  intros V ks c ws j L z p P W C.
  destruct (Rle_lt_dec (dual_quotient L z ws j) (dist z p / L)) as [| Q]; [assumption | exfalso].
  apply displacement with (X := V) (input_dist := fun x y => dist x y / L) (f := fun x => x) in Q.
  - apply weighted_gap_survives in Q; [| intros w I; now apply W].
    destruct Q as [w [I G]]. apply gap_pos in G. destruct (W w I) as [_ O].
    specialize (C _ O). lra.
  - split; [exact P |]. intros x y. right. field. lra.
  - apply norm_nonneg.
Qed.

(** * 7. Optimality and tightness *)

(** A certificate that knows only z and L has to serve every L-Lipschitz encoder with f x0 = z. It is sound
    for the radius r when every input that such an encoder sends into [bad] is at distance at least r. *)
Definition sound_radius (W V : inner_space) (L : R) (z : V) (bad : V -> Prop) (r : R) : Prop :=
  forall (f : W -> V) (x0 x : W), lipschitz dist f L -> f x0 = z -> bad (f x) -> r <= dist x0 x.

(** f(x) = z + (L <u, x - x0> / |p - z|) (p - z): the encoder that heads for p as fast as L allows. *)
Definition probe {W V : inner_space} (L : R) (u x0 : W) (z p : V) (x : W) : V :=
  add z (scale (L * inner u (sub x x0) / dist p z) (sub p z)).

Lemma probe_lipschitz : forall (W V : inner_space) (L : R) (u x0 : W) (z p : V),
  0 < L -> norm u = 1 -> lipschitz dist (probe L u x0 z p) L.
Proof.
  intros W V L u x0 z p P U. split; [exact P |]. intros x y.
  replace (dist (probe L u x0 z p x) (probe L u x0 z p y))
    with (Rabs (L * inner u (sub x y) / dist p z) * dist p z).
  - pose proof (cauchy_schwarz_abs u (sub x y)) as C. rewrite U in C. fold (dist x y) in C.
    pose proof (dist_nonneg p z). pose proof (dist_nonneg x y).
    destruct (Req_dec (dist p z) 0) as [E | E]; [rewrite E; nra |].
    unfold Rdiv. rewrite !Rabs_mult, (Rabs_right L), Rabs_inv, (Rabs_right (dist p z)) by lra.
    rewrite Rmult_assoc, Rinv_l by assumption. nra.
  - unfold dist at 2. rewrite <- norm_scale. unfold dist at 2. f_equal.
    apply vector_ext. intros v. unfold probe. expand. unfold Rdiv. ring.
Qed.

(** The probe starts at z, and at the input distance |p - z| / L it is at p. *)
Theorem probe_reaches : forall (W V : inner_space) (L : R) (u x0 : W) (z p : V),
  0 < L -> norm u = 1 ->
  probe L u x0 z p x0 = z /\
  exists x, probe L u x0 z p x = p /\ dist x0 x = dist z p / L.
Proof.
  intros W V L u x0 z p P U. split.
  - apply vector_ext. intros v. unfold probe. expand. unfold Rdiv. ring.
  - exists (add x0 (scale (dist z p / L) u)). split.
    + apply vector_ext. intros v. unfold probe. rewrite (dist_sym z p). expand.
      rewrite <- (norm_sq u), U.
      destruct (Req_dec (dist p z) 0) as [E | E]; [rewrite (dist_zero _ _ E); ring | field; lra].
    + unfold dist at 1.
      replace (sub x0 (add x0 (scale (dist z p / L) u))) with (scale (- (dist z p / L)) u).
      * rewrite norm_scale, U, Rabs_Ropp, Rabs_right; [ring |].
        pose proof (dist_nonneg z p). apply Rle_ge, divide_le; lra.
      * apply vector_ext. intros v. expand. ring.
Qed.

(** For any rule, that is for any set [bad] of embeddings, the sound radii are exactly those that do not
    exceed dist(z, bad) / L. The input space W is any space with a unit vector; W = V is one instance. *)
Theorem optimality :
  forall (W V : inner_space) (u : W) (L : R) (z : V) (bad : V -> Prop) (r : R),
  norm u = 1 -> 0 < L ->
  (sound_radius W V L z bad r <-> forall p, bad p -> r <= dist z p / L).
Proof.
  intros W V u L z bad r U P. split.
  - intros S p B. destruct (probe_reaches W V L u zero z p P U) as [S0 [x [E D]]].
    rewrite <- D. apply (S (probe L u zero z p)); [now apply probe_lipschitz | exact S0 | now rewrite E].
  - intros S f x0 x [_ F] E B. specialize (S _ B). specialize (F x0 x). rewrite E in F.
    eapply Rle_trans; [exact S |]. apply Rmult_le_reg_r with L; [exact P |].
    unfold Rdiv. rewrite Rmult_assoc, Rinv_l by lra. lra.
Qed.

(** Go from z straight towards a rival j, away from A. At the distance (d_j^2 - d_A^2) / (2 |mu_j - mu_A|),
    which is e = 0, lies the projection of z on the bisector: the gap is 0, so d_j = d_A. Further on, j is
    closer. *)
Lemma beyond_bisector : forall (V : inner_space) (z : V) (A j : cluster V) (e : R),
  centroid j <> centroid A -> d z A <= d z j -> 0 <= e ->
  exists p, dist z p = quotient 1 z A j + e /\ gap p A j = - (e * norm (normal A j)).
Proof.
  intros V z A j e N Q E0. rewrite quotient_gap, Rmult_1_l.
  pose proof (normal_pos A j N) as NP.
  assert (0 <= gap z A j) as GP by (unfold gap; pose proof (d_nonneg z A); nra).
  set (n := normal A j) in *.
  set (t := (gap z A j / norm n + e) / norm n).
  assert (0 <= t).
  { apply divide_le; [exact NP |]. assert (0 <= gap z A j / norm n) by (apply divide_le; lra). lra. }
  exists (add z (scale t n)). split.
  - unfold dist. replace (sub z (add z (scale t n))) with (scale (- t) n).
    + rewrite norm_scale, Rabs_Ropp, Rabs_right by lra. unfold t. field. lra.
    + apply vector_ext. intros v. expand. ring.
  - rewrite (gap_moved z). fold n.
    replace (sub (add z (scale t n)) z) with (scale t n) by (apply vector_ext; intros v; expand; ring).
    rewrite inner_scale, <- norm_sq. unfold t. field. lra.
Qed.

Lemma quotient_scaled : forall (V : inner_space) (L : R) (z : V) (i j : cluster V),
  quotient L z i j = quotient 1 z i j / L.
Proof. intros. unfold quotient, Rdiv. rewrite !Rinv_mult, Rinv_1. ring. Qed.

(** With one centroid in the predicted class, [nearest] is exact: the sound radii are exactly those up to it.
    A tie counts as a failure here. *)
Theorem nearest_tight :
  forall (W V : inner_space) (u : W) (L : R) (ks : list (cluster V)) (A : cluster V) (z : V) (r : R),
  norm u = 1 -> 0 < L ->
  own ks (label A) = [A] ->
  rivals ks (label A) <> [] ->
  (forall j, In j (rivals ks (label A)) -> d z A <= d z j) ->
  (sound_radius W V L z (fun p => ~ predicts ks p (label A)) r <-> r <= nearest_radius ks L z A).
Proof.
  intros W V u L ks A z r U P K N Q. split.
  - intros S. apply le_min; [exact N |]. intros j J. rewrite quotient_scaled.
    assert (forall p, gap p A j = 0 -> r <= dist z p / L) as B.
    { intros p T. apply (proj1 (optimality W V u L z _ r U P) S).
      intros [i [I B]]. rewrite K in I. destruct I as [<- | []].
      specialize (B j J). apply gap_pos in B. lra. }
    destruct (Req_dec (dist (centroid j) (centroid A)) 0) as [E | E].
    + apply dist_zero in E.
      assert (d z j = d z A) as T by (unfold d; now rewrite E).
      specialize (B z). rewrite dist_self in B. unfold quotient, gap, Rdiv in *.
      rewrite T, Rminus_diag_eq, !Rmult_0_l in * by reflexivity. auto.
    + destruct (beyond_bisector V z A j 0) as [p [D T]]; auto using Rle_refl.
      { intros E'. apply E. rewrite E'. apply dist_self. }
      rewrite Rplus_0_r in D. rewrite <- D. apply B. rewrite T. ring.
  - intros B f x0 x F E F'. destruct (Rle_lt_dec r (dist x0 x)) as [| C]; [assumption | exfalso].
    apply F'. apply (nearest_sound V W dist f L F ks A x0).
    + apply (in_own A ks (label A)). rewrite K. now left.
    + rewrite E. lra.
Qed.

(** However ties are broken, no larger radius is sound: the same bound holds when only a rival strictly closer
    than the whole class counts as a failure. *)
Theorem nearest_tight_strict :
  forall (W V : inner_space) (u : W) (L : R) (ks : list (cluster V)) (A : cluster V) (z : V) (r : R),
  norm u = 1 -> 0 < L ->
  own ks (label A) = [A] ->
  rivals ks (label A) <> [] ->
  (forall j, In j (rivals ks (label A)) -> d z A <= d z j /\ centroid j <> centroid A) ->
  sound_radius W V L z (fun p => exists j, In j (rivals ks (label A)) /\
                                 forall i, In i (own ks (label A)) -> d p j < d p i) r ->
  r <= nearest_radius ks L z A.
Proof.
  intros W V u L ks A z r U P K N Q S. apply le_min; [exact N |]. intros j J.
  destruct (Q j J) as [C NE]. rewrite quotient_scaled.
  apply divide_le; [exact P |]. apply le_epsilon. intros e E.
  destruct (beyond_bisector V z A j e) as [p [D T]]; try assumption; [now apply Rlt_le |].
  rewrite <- D. assert (r <= dist z p / L) as B.
  { apply (proj1 (optimality W V u L z _ r U P) S). exists j. split; [exact J |].
    rewrite K. intros i [<- | []]. apply gap_pos.
    replace (gap p j A) with (- gap p A j) by (unfold gap; field).
    rewrite T. pose proof (normal_pos A j NE). nra. }
  apply Rmult_le_compat_r with (r := L) in B; [| lra].
  unfold Rdiv in B. rewrite Rmult_assoc, Rinv_l in B; lra.
Qed.

(** * 8. Counterexample: the second nearest centroid is not enough *)

Lemma quotient_line : forall (L : R) (z : real_line) (i j : cluster real_line),
  quotient L z i j = ((z - centroid j) ^ 2 - (z - centroid i) ^ 2) / (2 * L * Rabs (centroid j - centroid i)).
Proof.
  intros L z i j. unfold quotient, d, normal. fold (dist (centroid j) (centroid i)).
  rewrite !dist_real_line, !pow2_abs. reflexivity.
Qed.

(** Decimals are rationals to Coq; [numbers] proves an equality between them. *)
Ltac numbers := unfold Q2R; cbn [QArith_base.Qnum QArith_base.Qden]; field.

(** Decides distances between numbers on the real line. *)
Ltac on_the_line := unfold d; rewrite ?dist_real_line; cbn [centroid]; split_Rabs; lra.

(** On the line, z = 0, centroids A at 1, B at 1.5 and C at -1.6 of three different classes. B is the second
    nearest, and its quotient alone would certify 1.25; yet a step of 0.31 gives the class of C. *)
Theorem second_nearest_unsound :
  let A := Cluster (1 : real_line) 0 in
  let B := Cluster (1.5 : real_line) 1 in
  let C := Cluster (-1.6 : real_line) 2 in
  let ks := [A; B; C] in
  let z := 0 : real_line in
  let z' := -0.31 : real_line in
  d z A < d z B < d z C /\
  quotient 1 z A B = 1.25 /\
  predicts ks z 0 /\
  dist z z' = 0.31 /\
  predicts ks z' 2.
Proof.
  intros A B C ks z z'. subst A B C ks z z'. repeat split.
  - on_the_line.
  - on_the_line.
  - rewrite quotient_line. cbn [centroid]. rewrite Rabs_right by lra. numbers.
  - eexists. split; [now left |]. intros j [<- | [<- | []]]; on_the_line.
  - on_the_line.
  - eexists. split; [now left |]. intros j [<- | [<- | []]]; on_the_line.
Qed.

(** * 9. The soft rule *)

Section SoftDefinitions.
Context {V : inner_space}.
Implicit Types (variance : R) (z : V) (k : cluster V) (ks : list (cluster V)) (c : nat) (q : weighted V).

(** -d_k^2 / (2 sigma^2), and g = ln (sum_k exp (-d_k^2 / (2 sigma^2))); [variance] is sigma^2. *)
Definition log_weight variance z k : R := - d z k ^ 2 / (2 * variance).
Definition mass variance z ks : R := sum (fun k => exp (log_weight variance z k)) ks.
Definition logit variance z ks : R := ln (mass variance z ks).

(** The soft rule predicts c at z: class c has centroids, and the greatest logit, strictly. *)
Definition soft_predicts variance ks z c : Prop :=
  own ks c <> [] /\
  forall b, b <> c -> own ks b <> [] -> logit variance z (own ks b) < logit variance z (own ks c).

(** q gives every cluster of the list a weight; the weights are non-negative and sum to 1. *)
Definition distribution ks q : Prop :=
  map snd q = ks /\ (forall w, In w q -> 0 <= fst w) /\ sum fst q = 1.

(** The entropy H(q), with 0 ln 0 = 0, and the mean mu_q = sum_i q_i mu_i. *)
Definition entropy q : R := - sum (fun w => fst w * ln (fst w)) q.
Definition mean q : V := vector_sum (fun w => scale (fst w) (centroid (snd w))) q.

(** H(q) - sum_i q_i d_i^2 / (2 sigma^2): by Gibbs' inequality no more than the logit of the class. *)
Definition class_floor variance z q : R := entropy q + weighted_sum (log_weight variance z) q.

(** The softmax weights exp(-d_k^2 / (2 sigma^2)) / mass, at which the floor is the logit. *)
Definition softmax variance z ks : weighted V :=
  map (fun k => (exp (log_weight variance z k) / mass variance z ks, k)) ks.

(** ln (sum_j exp (-d_j^2 / (2 sigma^2) + rho |mu_j - m| / sigma^2)). *)
Definition rival_ceiling variance z (m : V) (rho : R) ks : R :=
  ln (sum (fun j => exp (log_weight variance z j + rho * dist (centroid j) m / variance)) ks).

End SoftDefinitions.

Lemma ln_le_mono : forall x y, 0 < x -> x <= y -> ln x <= ln y.
Proof. intros x y P [Q | ->]; [apply Rlt_le, ln_increasing; assumption | apply Rle_refl]. Qed.

Lemma exp_le_mono : forall x y, x <= y -> exp x <= exp y.
Proof. intros x y [Q | ->]; [apply Rlt_le, exp_increasing; assumption | apply Rle_refl]. Qed.

Section SoftFacts.
Context {V : inner_space}.
Implicit Types (variance rho t D : R) (z : V) (i j k : cluster V)
  (is js ks : list (cluster V)) (q : weighted V).

Lemma exp_sum_pos : forall (F : cluster V -> R) ks, ks <> [] -> 0 < sum (fun k => exp (F k)) ks.
Proof. intros. apply sum_pos; [assumption |]. intros. apply exp_pos. Qed.

Lemma mass_pos : forall variance z ks, ks <> [] -> 0 < mass variance z ks.
Proof. intros. now apply exp_sum_pos. Qed.

Lemma exp_sum_shift : forall (F : cluster V -> R) a ks, ks <> [] ->
  ln (sum (fun k => exp (F k + a)) ks) = ln (sum (fun k => exp (F k)) ks) + a.
Proof.
  intros F a ks N. rewrite <- (ln_exp a) at 1.
  rewrite <- ln_mult; [| now apply exp_sum_pos | apply exp_pos]. f_equal.
  rewrite Rmult_comm, <- sum_scale. apply sum_ext. intros. rewrite exp_plus. ring.
Qed.

(** Gibbs' inequality, H(q) + sum_i q_i F_i <= ln (sum_i exp F_i), term by term from exp t >= 1 + t. *)
Lemma gibbs : forall ks q (F : cluster V -> R), distribution ks q ->
  entropy q + weighted_sum F q <= ln (sum (fun k => exp (F k)) ks).
Proof.
  intros ks q F [<- [P S]].
  assert (map snd q <> []) as N by (destruct q; [cbn in S; lra | discriminate]).
  pose proof (exp_sum_pos F _ N) as M.
  set (m := sum (fun k => exp (F k)) (map snd q)) in *.
  assert (sum (fun w => fst w * (F (snd w) - ln (fst w) - ln m)) q
          <= sum (fun w => / m * exp (F (snd w)) + -1 * fst w) q) as T.
  { apply sum_le. intros [w k] I. specialize (P _ I). cbn in *.
    destruct P as [W | <-].
    - replace (/ m * exp (F k)) with (w * exp (F k - ln w - ln m)).
      + pose proof (exp_ineq1_le (F k - ln w - ln m)). nra.
      + unfold Rminus. rewrite !exp_plus, !exp_Ropp, !exp_ln by assumption. field. lra.
    - pose proof (exp_pos (F k)). pose proof (Rinv_0_lt_compat m M). nra. }
  rewrite sum_linear, S, <- (sum_map snd (fun k => exp (F k))) in T. fold m in T.
  rewrite Rinv_l in T by lra.
  enough (sum (fun w => fst w * (F (snd w) - ln (fst w) - ln m)) q
          = entropy q + weighted_sum F q - ln m) by lra.
  unfold entropy, weighted_sum.
  replace (sum (fun w => fst w * (F (snd w) - ln (fst w) - ln m)) q)
    with (1 * sum (fun w => 1 * (fst w * F (snd w)) + -1 * (fst w * ln (fst w))) q + - ln m * sum fst q).
  - rewrite sum_linear, S. ring.
  - rewrite <- sum_linear. apply sum_ext. intros. ring.
Qed.

Lemma softmax_distribution : forall variance z ks, ks <> [] -> distribution ks (softmax variance z ks).
Proof.
  intros variance z ks N. pose proof (mass_pos variance z ks N) as M.
  unfold softmax. split; [| split].
  - rewrite map_map. apply map_id.
  - intros w I. apply in_map_iff in I. destruct I as [k [<- _]]. cbn.
    pose proof (exp_pos (log_weight variance z k)). apply divide_le; [assumption | lra].
  - rewrite sum_map. cbn.
    rewrite (sum_ext _ (fun k => / mass variance z ks * exp (log_weight variance z k)))
      by (intros; apply Rmult_comm).
    rewrite sum_scale. now apply Rinv_l, Rgt_not_eq.
Qed.

(** Gibbs' inequality is an equality at the softmax weights. *)
Lemma softmax_class_floor : forall variance z ks, ks <> [] ->
  class_floor variance z (softmax variance z ks) = logit variance z ks.
Proof.
  intros variance z ks N. destruct (softmax_distribution variance z ks N) as [_ [_ S]].
  pose proof (mass_pos variance z ks N) as M.
  rewrite <- (Rmult_1_r (logit variance z ks)), <- S, <- sum_scale.
  unfold class_floor, entropy, weighted_sum.
  rewrite <- (Rmult_1_l (sum (fun w => fst w * log_weight _ _ _) _)).
  replace (- sum (fun w => fst w * ln (fst w)) (softmax variance z ks))
    with (-1 * sum (fun w => fst w * ln (fst w)) (softmax variance z ks)) by ring.
  rewrite <- sum_linear. apply sum_ext. intros w I.
  apply in_map_iff in I. destruct I as [k [<- _]]. cbn. unfold Rdiv at 2, logit.
  rewrite ln_mult, ln_exp, ln_Rinv; [ring | assumption | apply exp_pos | now apply Rinv_0_lt_compat].
Qed.

(** All log-weights move by <v, mu_k> / sigma^2 plus one common term. *)
Lemma log_weight_moved : forall variance z z' k, 0 < variance ->
  log_weight variance z' k =
  log_weight variance z k + (inner (sub z' z) (centroid k) / variance
    - (inner (sub z' z) z + inner (sub z' z) (sub z' z) / 2) / variance).
Proof.
  intros variance z z' k P. unfold log_weight, d. rewrite !dist_sq. expand.
  rewrite !(inner_sym V (centroid _) z), !(inner_sym V (centroid _) z'), (inner_sym V z z').
  field. lra.
Qed.

Lemma inner_mean : forall (v : V) q,
  inner v (mean q) = weighted_sum (fun k => inner v (centroid k)) q.
Proof.
  intros. unfold mean. rewrite inner_vector_sum. apply sum_ext. intros. apply inner_scale_r.
Qed.

(** What every soft bound rests on: while the rivals' ceiling around mu_q stays below the floor, the class
    keeps the greater logit. *)
Lemma soft_step : forall variance z z' is js q, 0 < variance -> js <> [] -> distribution is q ->
  rival_ceiling variance z (mean q) (dist z z') js < class_floor variance z q ->
  logit variance z' js < logit variance z' is.
Proof.
  intros variance z z' is js q P N Q B.
  set (v := sub z' z).
  set (K := (inner v z + inner v v / 2) / variance).
  set (a := inner v (mean q) / variance - K).
  assert (logit variance z' js <= rival_ceiling variance z (mean q) (dist z z') js + a) as Hi.
  { unfold rival_ceiling. rewrite <- exp_sum_shift by assumption.
    apply ln_le_mono; [now apply exp_sum_pos |]. apply sum_le. intros j _.
    apply exp_le_mono. rewrite (log_weight_moved variance z z' j P). fold v K. unfold a.
    pose proof (inner_displacement z z' (sub (centroid j) (mean q))) as C.
    fold v (dist (centroid j) (mean q)) in C.
    assert (inner v (centroid j) / variance - inner v (mean q) / variance
            <= dist z z' * dist (centroid j) (mean q) / variance); [| lra].
    revert C. unfold sub at 1. rewrite inner_add_r, inner_opp_r. intros C.
    unfold Rdiv. rewrite <- Rmult_minus_distr_r.
    apply Rmult_le_compat_r; [now apply Rlt_le, Rinv_0_lt_compat | lra]. }
  assert (class_floor variance z q + a <= logit variance z' is) as Lo.
  { eapply Rle_trans; [| exact (gibbs is q (log_weight variance z') Q)].
    destruct Q as [_ [_ S]]. right. unfold class_floor, a. rewrite inner_mean, Rplus_assoc. f_equal.
    unfold weighted_sum.
    transitivity (1 * sum (fun w => 1 * (fst w * log_weight variance z (snd w))
                                    + / variance * (fst w * inner v (centroid (snd w)))) q
                  + - K * sum fst q).
    + rewrite sum_linear, S. unfold Rdiv. ring.
    + rewrite <- sum_linear. apply sum_ext. intros w _.
      rewrite (log_weight_moved variance z z' (snd w) P). fold v K. unfold Rdiv. ring. }
  lra.
Qed.

(** The ceiling grows with rho, unless no rival centroid differs from m: then it does not move at all. *)
Lemma ceiling_below : forall variance z (m : V) t rho js G, 0 < variance -> js <> [] -> 0 <= t < rho ->
  logit variance z js < G -> rival_ceiling variance z m rho js <= G ->
  rival_ceiling variance z m t js < G.
Proof.
  intros variance z m t rho js G P N T B0 B.
  set (S := fun r => sum (fun j => exp (log_weight variance z j + r * dist (centroid j) m / variance))).
  assert (S t js < S rho js \/ S t js = mass variance z js) as [Q | E].
  - clear N B0 B.
    assert (S t js <= S rho js /\ (S t js < S rho js \/ S t js = mass variance z js)); [| tauto].
    pose proof (Rinv_0_lt_compat _ P) as PI.
    induction js as [| j js [IH IH']]; [cbn; lra |].
    unfold S, mass in *. rewrite !sum_cons. unfold Rdiv in *.
    destruct (dist_nonneg (centroid j) m) as [Dj | Dj].
    + assert (exp (log_weight variance z j + t * dist (centroid j) m * / variance)
              < exp (log_weight variance z j + rho * dist (centroid j) m * / variance)).
      { apply exp_increasing, Rplus_lt_compat_l, Rmult_lt_compat_r, Rmult_lt_compat_r; lra. }
      lra.
    + rewrite <- Dj, !Rmult_0_r, !Rmult_0_l, !Rplus_0_r. lra.
  - eapply Rlt_le_trans; [| exact B]. apply ln_increasing; [now apply exp_sum_pos | exact Q].
  - unfold rival_ceiling. fold (S t js). rewrite E. exact B0.
Qed.

Lemma ceiling_le : forall variance z (m : V) t D js, 0 < variance -> js <> [] -> 0 <= t ->
  (forall j, In j js -> dist (centroid j) m <= D) ->
  rival_ceiling variance z m t js <= logit variance z js + t * D / variance.
Proof.
  intros variance z m t D js P N T B.
  unfold logit, mass. rewrite <- exp_sum_shift by assumption.
  apply ln_le_mono; [now apply exp_sum_pos |]. apply sum_le. intros j J.
  apply exp_le_mono, Rplus_le_compat_l, Rmult_le_compat_r.
  - now apply Rlt_le, Rinv_0_lt_compat.
  - apply Rmult_le_compat_l; auto.
Qed.

(** A mean is no farther from p than the farthest of the centroids averaged: by this the local bound is at
    least the global one. *)
Lemma mean_in_ball : forall (p : V) D is q, 0 <= D -> distribution is q ->
  (forall i, In i is -> dist p (centroid i) <= D) -> dist p (mean q) <= D.
Proof.
  intros p D is q D0 [<- [P S]] B.
  set (v := sub p (mean q)).
  assert (inner v v <= norm v * D) as C.
  { replace (inner v v) with (sum (fun w => fst w * inner v (sub p (centroid (snd w)))) q).
    - replace (norm v * D) with (sum (fun w => norm v * D * fst w) q) by (rewrite sum_scale, S; ring).
      apply sum_le. intros w I. specialize (P w I).
      pose proof (B _ (in_map snd _ _ I)). pose proof (cauchy_schwarz v (sub p (centroid (snd w)))).
      fold (dist p (centroid (snd w))) in *. pose proof (norm_nonneg v).
      assert (inner v (sub p (centroid (snd w))) <= norm v * D) by nra. nra.
    - transitivity (inner v p * sum fst q + -1 * inner v (mean q)).
      + rewrite inner_mean. unfold weighted_sum. rewrite <- sum_linear. apply sum_ext. intros. expand. ring.
      + rewrite S. unfold v at 4. unfold sub. rewrite inner_add_r, inner_opp_r. ring. }
  rewrite <- norm_sq in C. unfold dist. fold v. pose proof (norm_nonneg v). nra.
Qed.

End SoftFacts.

(** (d) The dual bound. For each rival class b take any weights q on class c; if the ceiling of b at rho_b is
    no higher than the floor of q, no input closer than the least rho_b leaves c. (The strict inequality at
    rho = 0 says that c leads at f x; it matters only where every centroid of b lies at mu_q and the ceiling
    is constant.) *)
Theorem soft_dual_sound :
  forall (V : inner_space) (X : Type) (input_dist : X -> X -> R) (f : X -> V) (L : R),
  lipschitz input_dist f L ->
  forall (ks : list (cluster V)) (c : nat) (variance : R) (q : nat -> weighted V) (rho : nat -> R)
         (x x' : X),
  0 < variance -> own ks c <> [] ->
  (forall b, b <> c -> own ks b <> [] ->
    distribution (own ks c) (q b) /\
    logit variance (f x) (own ks b) < class_floor variance (f x) (q b) /\
    rival_ceiling variance (f x) (mean (q b)) (L * rho b) (own ks b) <= class_floor variance (f x) (q b) /\
    input_dist x x' < rho b) ->
  soft_predicts variance ks (f x') c.
Proof.
  intros V X D f L [P F] ks c variance q rho x x' PV N B.
  split; [exact N |]. intros b C NB. destruct (B b C NB) as [W [M [E Q]]].
  apply soft_step with (z := f x) (q := q b); try assumption.
  apply ceiling_below with (L * rho b); try assumption.
  split; [apply dist_nonneg |]. specialize (F x x'). nra.
Qed.

(** (c) The lse bound: the same at the softmax weights of class c, where the floor is the logit of c. *)
Theorem soft_lse_sound :
  forall (V : inner_space) (X : Type) (input_dist : X -> X -> R) (f : X -> V) (L : R),
  lipschitz input_dist f L ->
  forall (ks : list (cluster V)) (c : nat) (variance : R) (rho : nat -> R) (x x' : X),
  0 < variance ->
  soft_predicts variance ks (f x) c ->
  (forall b, b <> c -> own ks b <> [] ->
    rival_ceiling variance (f x) (mean (softmax variance (f x) (own ks c))) (L * rho b) (own ks b)
    <= logit variance (f x) (own ks c) /\
    input_dist x x' < rho b) ->
  soft_predicts variance ks (f x') c.
Proof.
  intros V X D f L H ks c variance rho x x' PV [N M] B.
  apply (soft_dual_sound V X D f L H ks c variance
           (fun _ => softmax variance (f x) (own ks c)) rho x); try assumption.
  intros b C NB. rewrite softmax_class_floor by exact N.
  auto using softmax_distribution.
Qed.

(** (b) The local mean bound: (g_c - g_b) sigma^2 / (L D_b) for each rival class b, where D_b is at least
    every distance from a centroid of b to the softmax mean of class c at f x. *)
Theorem soft_local_sound :
  forall (V : inner_space) (X : Type) (input_dist : X -> X -> R) (f : X -> V) (L : R),
  lipschitz input_dist f L ->
  forall (ks : list (cluster V)) (c : nat) (variance : R) (D : nat -> R) (x x' : X),
  0 < variance -> own ks c <> [] ->
  (forall b, b <> c -> own ks b <> [] ->
    (forall j, In j (own ks b) ->
      dist (centroid j) (mean (softmax variance (f x) (own ks c))) <= D b) /\
    input_dist x x' <
      (logit variance (f x) (own ks c) - logit variance (f x) (own ks b)) * variance / (L * D b)) ->
  soft_predicts variance ks (f x') c.
Proof.
  intros V X D f L H ks c variance Db x x' PV N B.
  split; [exact N |]. intros b C NB. destruct (B b C NB) as [M Q].
  assert (0 <= Db b) as D0.
  { destruct (own ks b) as [| j js]; [contradiction |].
    exact (Rle_trans _ _ _ (dist_nonneg _ _) (M j (in_eq _ _))). }
  apply displacement with (1 := H) in Q; [| exact D0].
  apply soft_step with (z := f x) (q := softmax variance (f x) (own ks c)); auto using softmax_distribution.
  rewrite softmax_class_floor by exact N.
  eapply Rle_lt_trans; [apply ceiling_le with (D := Db b); auto using dist_nonneg |].
  enough (dist (f x) (f x') * Db b / variance
          < logit variance (f x) (own ks c) - logit variance (f x) (own ks b)) by lra.
  apply Rmult_lt_reg_r with variance; [exact PV |].
  unfold Rdiv. rewrite Rmult_assoc, Rinv_l; lra.
Qed.

(** (a) The global bound: the same with D_b at least every distance between a centroid of c and one of b. *)
Theorem soft_global_sound :
  forall (V : inner_space) (X : Type) (input_dist : X -> X -> R) (f : X -> V) (L : R),
  lipschitz input_dist f L ->
  forall (ks : list (cluster V)) (c : nat) (variance : R) (D : nat -> R) (x x' : X),
  0 < variance -> own ks c <> [] ->
  (forall b, b <> c -> own ks b <> [] ->
    (forall i j, In i (own ks c) -> In j (own ks b) -> dist (centroid i) (centroid j) <= D b) /\
    input_dist x x' <
      (logit variance (f x) (own ks c) - logit variance (f x) (own ks b)) * variance / (L * D b)) ->
  soft_predicts variance ks (f x') c.
Proof.
  intros V X D f L H ks c variance Db x x' PV N B.
  apply (soft_local_sound V X D f L H ks c variance Db x); try assumption.
  intros b C NB. destruct (B b C NB) as [M Q]. split; [| exact Q].
  intros j J. apply mean_in_ball with (own ks c).
  - destruct (own ks c) as [| i is]; [contradiction |].
    exact (Rle_trans _ _ _ (dist_nonneg _ _) (M i j (in_eq _ _) J)).
  - now apply softmax_distribution.
  - intros i I. rewrite dist_sym. now apply M.
Qed.

(** With one centroid in each of the two classes the global bound is the quotient of the nearest rule. *)
Theorem soft_global_single :
  forall (V : inner_space) (variance L : R) (z : V) (i j : cluster V),
  0 < variance ->
  (logit variance z [i] - logit variance z [j]) * variance / (L * dist (centroid j) (centroid i))
  = quotient L z i j.
Proof.
  intros V variance L z i j P. rewrite quotient_gap.
  unfold logit, mass, sum. cbn [fold_right]. rewrite !Rplus_0_r, !ln_exp.
  unfold normal. fold (dist (centroid j) (centroid i)). f_equal.
  unfold log_weight, gap. field. lra.
Qed.

(** Against a class of one centroid j the dual bound is solved for rho in closed form: rho |mu_j - mu_q| <=
    sum_i q_i (d_j^2 - d_i^2) / 2 + sigma^2 H(q). *)
Theorem soft_dual_one_rival :
  forall (V : inner_space) (is : list (cluster V)) (q : weighted V) (variance rho : R)
         (z : V) (j : cluster V),
  0 < variance -> distribution is q ->
  (rival_ceiling variance z (mean q) rho [j] <= class_floor variance z q <->
   rho * dist (centroid j) (mean q) <= weighted_sum (fun i => gap z i j) q + variance * entropy q).
Proof.
  intros V is q variance rho z j P [_ [_ S]].
  replace (weighted_sum (fun i => gap z i j) q)
    with (- variance * log_weight variance z j * sum fst q
          + variance * weighted_sum (log_weight variance z) q).
  - rewrite S. unfold rival_ceiling, class_floor, sum. cbn [fold_right]. rewrite Rplus_0_r, ln_exp.
    set (a := rho * dist (centroid j) (mean q)).
    assert (a = variance * (a / variance)) as E by (field; lra).
    split; intros Q; [rewrite E | rewrite E in Q]; nra.
  - unfold weighted_sum. rewrite <- sum_linear. apply sum_ext. intros w _.
    unfold log_weight, gap. field. lra.
Qed.

(** The sigma^2 log k correction. A hard-rule numerator becomes sound for the soft rule when sigma^2 ln k is
    taken off, k the size of the rival's class; i may be the same for every rival ([nearest]) or not
    ([pairwise]). *)
Theorem soft_log_k_sound :
  forall (V : inner_space) (X : Type) (input_dist : X -> X -> R) (f : X -> V) (L : R),
  lipschitz input_dist f L ->
  forall (ks : list (cluster V)) (c : nat) (variance : R) (x x' : X),
  0 < variance -> own ks c <> [] ->
  (forall j, In j (rivals ks c) -> exists i, In i (own ks c) /\
    input_dist x x' <
      (gap (f x) i j - variance * ln (INR (length (own ks (label j))))) / (L * norm (normal i j))) ->
  soft_predicts variance ks (f x') c.
Proof.
  intros V X D f L H ks c variance x x' PV N B.
  split; [exact N |]. intros b C NB.
  assert (0 < INR (length (own ks b))) as K.
  { apply lt_0_INR. destruct (own ks b); [contradiction | cbn; auto with arith]. }
  set (k := INR (length (own ks b))) in *.
  apply ln_increasing; [now apply mass_pos |].
  replace (mass variance (f x') (own ks c))
    with (sum (fun _ => mass variance (f x') (own ks c) / k) (own ks b))
    by (rewrite sum_const; fold k; field; lra).
  apply sum_lt; [exact NB |]. intros j J. apply in_own in J. destruct J as [J E].
  destruct (B j) as [i [I Q]]; [apply in_rivals; split; congruence |].
  rewrite E in Q. fold k in Q.
  apply displacement with (1 := H) in Q; [| apply norm_nonneg].
  pose proof (inner_displacement (f x) (f x') (normal i j)).
  pose proof (gap_moved (f x) (f x') i j).
  apply Rlt_le_trans with (exp (log_weight variance (f x') i + - ln k)).
  - apply exp_increasing.
    replace (log_weight variance (f x') j)
      with (log_weight variance (f x') i - gap (f x') i j / variance)
      by (unfold log_weight, gap; field; lra).
    apply Rplus_lt_compat_l, Ropp_lt_contravar.
    apply Rmult_lt_reg_r with variance; [exact PV |].
    unfold Rdiv. rewrite Rmult_assoc, Rinv_l; lra.
  - rewrite exp_plus, exp_Ropp, exp_ln by exact K.
    apply Rmult_le_compat_r; [now apply Rlt_le, Rinv_0_lt_compat |].
    apply (term_le_sum (fun i => exp (log_weight variance (f x') i))); [| exact I].
    intros. apply Rlt_le, exp_pos.
Qed.

Lemma log_weight_line : forall (variance : R) (z : real_line) (k : cluster real_line),
  log_weight variance z k = - (z - centroid k) ^ 2 / (2 * variance).
Proof. intros. unfold log_weight, d. now rewrite dist_real_line, pow2_abs. Qed.

(** Without the correction it is not. On the line, sigma = 1, class 0 at {1, 100}, two centroids of class 1 at
    -1.1, z = 0.4: [nearest] gives 0.45, but a step of 0.4 already flips the soft rule. *)
Theorem soft_nearest_unsound :
  let A := Cluster (1 : real_line) 0 in
  let A' := Cluster (100 : real_line) 0 in
  let B := Cluster (-1.1 : real_line) 1 in
  let ks := [A; A'; B; B] in
  let z := 0.4 : real_line in
  let z' := 0 : real_line in
  nearest_radius ks 1 z A = 0.45 /\
  soft_predicts 1 ks z 0 /\
  dist z z' = 0.4 /\
  soft_predicts 1 ks z' 1.
Proof.
  intros A A' B ks z z'.
  assert (forall c, (c = 0 \/ c = 1 \/ own ks c = [])%nat) as classes.
  { intros [| [| c]]; auto. }
  split; [| split; [| split]].
  - change (Rmin (quotient 1 z A B) (quotient 1 z A B) = 0.45).
    rewrite Rmin_left, quotient_line by apply Rle_refl. cbn [centroid A B]. subst z.
    rewrite Rabs_left by lra. numbers.
  - split; [discriminate |]. intros b C N.
    destruct (classes b) as [E | [-> | E]]; [contradiction | | contradiction].
    change (own ks 1) with [B; B]. change (own ks 0) with [A; A'].
    apply ln_increasing; [now apply mass_pos |].
    unfold mass. cbn [sum fold_right]. rewrite !log_weight_line. subst z. cbn [centroid A A' B].
    pose proof (exp_pos (- (0.4 - 100) ^ 2 / (2 * 1))).
    replace (- (0.4 - 1) ^ 2 / (2 * 1)) with (- (0.4 - -1.1) ^ 2 / (2 * 1) + 0.4725 + 0.4725) by numbers.
    rewrite !exp_plus. pose proof (exp_ineq1_le 0.4725).
    assert (2 < exp 0.4725 * exp 0.4725) by nra.
    pose proof (exp_pos (- (0.4 - -1.1) ^ 2 / (2 * 1))). nra.
  - subst z z'. on_the_line.
  - split; [discriminate |]. intros b C N.
    destruct (classes b) as [-> | [E | E]]; [| contradiction | contradiction].
    change (own ks 1) with [B; B]. change (own ks 0) with [A; A'].
    apply ln_increasing; [now apply mass_pos |].
    unfold mass. cbn [sum fold_right]. rewrite !log_weight_line. subst z'. cbn [centroid A A' B].
    replace (- (0 - 100) ^ 2 / (2 * 1)) with (- (0 - 1) ^ 2 / (2 * 1) + - 4999.5) by numbers.
    replace (- (0 - -1.1) ^ 2 / (2 * 1)) with (- (0 - 1) ^ 2 / (2 * 1) + - 0.105) by numbers.
    rewrite !exp_plus. pose proof (exp_ineq1_le (- 0.105)).
    assert (exp (- 4999.5) < 0.1).
    { pose proof (exp_ineq1_le 4999.5). pose proof (exp_pos (- 4999.5)).
      assert (exp (- 4999.5) * exp 4999.5 = 1) by (rewrite <- exp_plus, <- exp_0; f_equal; lra). nra. }
    pose proof (exp_pos (- (0 - 1) ^ 2 / (2 * 1))). nra.
Qed.

(** * 10. What the proofs assume *)

(** Each list below is that of all the theorems named in the tuple above it. One search serves many theorems
    because every search goes through the whole of the standard library's reals. *)
Definition hard_rule_theorems :=
  (identity, @predicts_nearest, @predicts_unique, dual_sound, pairwise_sound, nearest_sound,
   triangle_le_nearest, nearest_le_pairwise, pairwise_is_one_hot_dual, dual_le_exact,
   probe_reaches, optimality, nearest_tight, nearest_tight_strict, second_nearest_unsound).

(** The three axioms with which the standard library builds the real numbers. *)
Print Assumptions hard_rule_theorems.

Definition soft_rule_theorems :=
  (soft_dual_sound, soft_lse_sound, soft_local_sound, soft_global_sound, soft_global_single,
   soft_dual_one_rival, soft_log_k_sound, soft_nearest_unsound).

(** The same and the excluded middle, which the standard library itself uses to prove that exp is positive and
    increasing. *)
Print Assumptions soft_rule_theorems.
